"""What an adapter file holds, told from its two files alone, and whether it fits a base."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from minilora.adapters.adapter_files import faults_of_loading, read_adapter_config, read_adapter_tensors
from minilora.adapters.config import LoraConfig, scaling
from minilora.adapters.injection import make_adapter
from minilora.adapters.peft_config import PeftConfig, read_peft_config

PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class Update:
    """ΔW = scaling · B A of one layer."""

    rank: int
    scaling: float
    norm: float  # ‖ΔW‖, Frobenius; of a DoRA layer without its magnitudes


@dataclass(frozen=True)
class Inspection:
    """All that an adapter's files tell."""

    config: LoraConfig  # as it was made, by slices perhaps
    stored: PeftConfig
    tensors: dict[str, Tensor]
    updates: dict[str, Update]  # by the path of the layer

    @property
    def kind(self) -> str:
        name = "DoRA" if self.config.use_dora else "LoRA"
        return f"rank-stabilised {name}" if self.config.use_rslora else name

    @property
    def others(self) -> list[str]:
        """Names of the tensors that are no low-rank pair: magnitudes, biases, modules saved whole."""
        ends = (*PAIRS, *PAIRS.values())
        return [name for name in self.tensors if not name.endswith(ends)]


def inspect_adapter(path: Path | str) -> Inspection:
    """Reads an adapter of any model; errors as in read_adapter_config and read_adapter_tensors."""
    stored, tensors = read_peft_config(path), read_adapter_tensors(path)
    updates = {}
    for name, A in tensors.items():
        end = next((end for end in PAIRS if name.endswith(end)), None)
        if end and name.removesuffix(end) + PAIRS[end] in tensors:
            layer, B = name.removesuffix(end), tensors[name.removesuffix(end) + PAIRS[end]]
            scale = scaling(stored.lora.rank(layer), stored.lora.alpha(layer), stored.lora.use_rslora)
            updates[layer] = Update(len(A), scale, scale * product_norm(B, A))
    return Inspection(read_adapter_config(path), stored, tensors, updates)


def product_norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖, Frobenius, without B A: its square is tr((BᵀB)(AAᵀ)), found in float64. Kernels of convolutions are flattened."""
    A, B = A.double().flatten(1), B.double().flatten(1)  # (r, in), (out, r)
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def misfits(inspection: Inspection, model: nn.Module) -> list[str]:
    """Why an adapter does not fit a base, which may be on the meta device: every name and every shape; empty where it fits."""
    settings = {"init_lora_weights": True}  # whose start it takes says nothing about names and shapes
    config, fused = (replace(config, **settings) for config in (inspection.config, inspection.stored.lora))
    try:
        return faults_of_loading(model, make_adapter(model, config, None), fused, inspection.tensors)
    except ValueError as error:  # targets that are not in the model: what else is wrong is told by the tensors
        return [*str(error).split("; "), *_misplaced(inspection, model)]


def _misplaced(inspection: Inspection, model: nn.Module) -> list[str]:
    weights, faults = dict(model.named_parameters(remove_duplicate=False)), []
    for path in inspection.updates:
        A, B = (inspection.tensors.get(f"{path}.{factor}.weight") for factor in ("lora_A", "lora_B"))
        weight = weights.get(f"{path}.weight")
        if weight is None:
            faults.append(f"{path} is not in the model")
        elif A is not None and A.ndim == 2 and set(weight.shape) != {len(B), A.shape[1]}:  # either way round, as GPT-2's lie
            faults.append(f"{path}.weight must have shape {(len(B), A.shape[1])}, not {tuple(weight.shape)}")
    return faults
