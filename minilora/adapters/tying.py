"""Modules that share an embedding's weight share its adapter: the head of a model with tied embeddings follows the embedding.

    embedding  y = W[ids] + s · lora_A[:, ids]ᵀ lora_Bᵀ        head  y = x Wᵀ + s · drop(x) lora_B lora_A

One ΔW = s (lora_B lora_A)ᵀ changes the one W under both, so that it can be merged into it; the gradients of both uses add up.
PEFT calls this ensure_weight_tying, and writes the head's factors as a second pair, crossed over.
"""

from collections.abc import Set

from torch import Tensor, nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.embedding import Embedding
from minilora.adapters.layers import Linear, LoRALayer
from minilora.adapters.matching import excluded


class TiedLinear(Linear):
    """A linear layer with the adapter of the embedding whose weight it shares; dropout acts here and not there, as in PEFT.

    Parameters:
        lora_A (r, out_features), lora_B (in_features, r): the embedding's own, the same objects.
    """

    reset_lora_parameters = Embedding.reset_lora_parameters
    delta = Embedding.delta  # bit for bit, so that merging finds both alike

    @classmethod
    def following(cls, linear: Linear, source: LoRALayer) -> "TiedLinear":
        """The same layer with the adapter of source in place of its own."""
        layer = cls._taking_over(linear)
        layer.lora_A, layer.lora_B = source.lora_A, source.lora_B
        return layer

    def lora_shapes(self):
        return (self.r, self.out_features), (self.in_features, self.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The embedding's, crossed over: (r, in_features) and (out_features, r)."""
        return self.lora_B.T, self.lora_A.T

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        super().set_factors(B.T, A.T)


def tied_groups(model: nn.Module, config: LoraConfig) -> list[list[str]]:
    """The paths of the embeddings and linear layers of one weight, for each weight that an embedding shares; none where config
    lets each have an adapter of its own.
    """
    if not config.ensure_weight_tying:
        return []
    holders: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and isinstance(module, nn.Embedding | nn.Linear):
            holders.setdefault(weight, {})[path] = module
    shared = [group for group in holders.values() if any(isinstance(module, nn.Embedding) for module in group.values())]
    return [list(group) for group in shared if len(group) > 1]


def followers(model: nn.Module, chosen: Set[str], config: LoraConfig) -> set[str]:
    """The paths of the modules that are tied to a chosen one, and not chosen themselves."""
    return {path for group in tied_groups(model, config) if not chosen.isdisjoint(group) for path in group} - chosen


def faults_of_tying(model: nn.Module, adapted: Set[str], config: LoraConfig) -> list[str]:
    """Why tied modules among the adapted ones cannot share one adapter."""
    faults = []
    for group in tied_groups(model, config):
        if adapted.isdisjoint(group):
            continue
        settings = {(config.rank(path), config.alpha(path)) for path in group}
        if len(settings) > 1:
            faults.append(
                f"{' and '.join(group)} are tied, and must share one r and lora_alpha, not {sorted(settings)}: name both in "
                "rank_pattern and alpha_pattern"
            )
        faults += [f"{path} is excluded, and tied to what is adapted" for path in group if excluded(path, config)]
    return faults


def with_shared_adapters(layers: dict[str, LoRALayer]) -> dict[str, LoRALayer]:
    """The layers by their paths, those that share an embedding's weight with that embedding's adapter."""
    sources: dict[nn.Parameter, Embedding] = {}
    for layer in layers.values():
        if isinstance(layer, Embedding):
            sources.setdefault(layer.weight, layer)
    return layers | {path: _following(layer, sources[layer.weight]) for path, layer in layers.items() if layer.weight in sources}


def _following(layer: LoRALayer, source: LoRALayer) -> LoRALayer:
    if isinstance(layer, Linear):
        return TiedLinear.following(layer, source)
    layer.lora_A, layer.lora_B = source.lora_A, source.lora_B  # of source itself, or of another embedding
    return layer
