"""transformers' Phi-3 with PEFT's adapters, attention by SDPA."""

from peft import LoraConfig, get_peft_model
from side import TARGETS, Adapter, Settings, layer_paths
from torch import Tensor, float32, nn
from transformers import Phi3ForCausalLM


def build(folder: str, config: dict, settings: Settings) -> nn.Module:
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=float32)
    peft = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, peft).train()


def adapters(model: nn.Module, config: dict) -> dict[str, Adapter]:
    layers = {path: model.get_submodule(f"base_model.model.{path}") for paths in layer_paths(config) for path in paths.values()}
    return {path: Adapter([layer.lora_A["default"].weight], [layer.lora_B["default"].weight]) for path, layer in layers.items()}


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss
