"""torchtune's Phi-3 with its LoRA layers, and the chunked loss of its own Phi-3 recipe.

All of q, k, v, gate and up are projections of their own, with an A each.
"""

import torch.nn.functional as F
from side import Adapter, Settings, layer_paths, put, read_weights
from torch import Tensor, nn
from torchtune.models.phi3 import lora_phi3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

cross_entropy = CEWithChunkedOutputLoss()


def build(folder: str, config: dict, settings: Settings) -> nn.Module:
    model = lora_phi3(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_theta"],
        lora_rank=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
    )
    if config["tie_word_embeddings"]:
        model.output.weight = model.tok_embeddings.weight
    put(model, _renamed(read_weights(folder), config))
    set_trainable_params(model, get_adapter_params(model))
    model.set_num_output_chunks(cross_entropy.num_output_chunks)
    return model.train()


def _renamed(weights: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors by torchtune's names."""
    D, kv = config["head_dim"], config["num_key_value_heads"]
    named = {"tok_embeddings.weight": weights["model.embed_tokens.weight"], "norm.scale": weights["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        named["output.weight"] = weights["lm_head.weight"]
    for i, paths in enumerate(layer_paths(config)):
        q, k, v = weights[f"{paths['qkv_proj']}.weight"].split([config["num_attention_heads"] * D, kv * D, kv * D])
        gate, up = weights[f"{paths['gate_up_proj']}.weight"].chunk(2)
        layer = {
            "sa_norm.scale": weights[f"model.layers.{i}.input_layernorm.weight"],
            "mlp_norm.scale": weights[f"model.layers.{i}.post_attention_layernorm.weight"],
            "attn.q_proj.weight": q,
            "attn.k_proj.weight": k,
            "attn.v_proj.weight": v,
            "attn.output_proj.weight": weights[f"{paths['o_proj']}.weight"],
            "mlp.w1.weight": gate,
            "mlp.w3.weight": up,
            "mlp.w2.weight": weights[f"{paths['down_proj']}.weight"],
        }
        named |= {f"layers.{i}.{name}": weight for name, weight in layer.items()}
    return named


def adapters(model: nn.Module, config: dict) -> dict[str, Adapter]:
    found = {}
    for paths, layer in zip(layer_paths(config), model.layers, strict=True):
        parts = {
            "qkv_proj": [layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj],
            "o_proj": [layer.attn.output_proj],
            "gate_up_proj": [layer.mlp.w1, layer.mlp.w3],
            "down_proj": [layer.mlp.w2],
        }
        for name, linears in parts.items():
            found[paths[name]] = Adapter([part.lora_a.weight for part in linears], [part.lora_b.weight for part in linears])
    return found


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    labels = F.pad(ids[:, 1:], (0, 1), value=cross_entropy.ignore_index)
    return cross_entropy(model(ids), labels)
