"""litgpt's GPT with its LoRA layers, and the chunked loss of its own fine-tuning script.

Queries, keys and values share a projection and have an A each; gate and up are projections of their own.
"""

from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.utils import chunked_cross_entropy
from side import Adapter, Settings, layer_paths, put, read_weights
from torch import Tensor, nn


def build(folder: str, config: dict, settings: Settings) -> nn.Module:
    sizes = Config(
        name="phi3",
        block_size=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"],
        n_embd=config["hidden_size"],
        padded_vocab_size=config["vocab_size"],
        vocab_size=config["vocab_size"],
        norm_class_name="RMSNorm",
        norm_eps=config["rms_norm_eps"],
        parallel_residual=False,
        n_head=config["num_attention_heads"],
        head_size=config["head_dim"],
        n_query_groups=config["num_key_value_heads"],
        rope_base=config["rope_theta"],
        rotary_percentage=1.0,
        intermediate_size=config["intermediate_size"],
        bias=False,
        mlp_class_name="LLaMAMLP",
        lora_r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        **{f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")},
    )
    model = GPT(sizes)
    if config["tie_word_embeddings"]:
        model.lm_head.linear.weight = model.transformer.wte.weight
    put(model, _renamed(read_weights(folder), config))
    mark_only_lora_as_trainable(model)
    return model.train()


def _renamed(weights: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors by litgpt's names."""
    named = {
        "lm_head.linear.weight": weights.get("lm_head.weight"),
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    for i, paths in enumerate(layer_paths(config)):
        gate, up = weights[f"{paths['gate_up_proj']}.weight"].chunk(2)
        layer = {
            "norm_1.weight": weights[f"model.layers.{i}.input_layernorm.weight"],
            "norm_2.weight": weights[f"model.layers.{i}.post_attention_layernorm.weight"],
            "attn.qkv.linear.weight": weights[f"{paths['qkv_proj']}.weight"],
            "attn.proj.linear.weight": weights[f"{paths['o_proj']}.weight"],
            "mlp.fc_1.linear.weight": gate,
            "mlp.fc_2.linear.weight": up,
            "mlp.proj.linear.weight": weights[f"{paths['down_proj']}.weight"],
        }
        named |= {f"transformer.h.{i}.{name}": weight for name, weight in layer.items()}
    if config["tie_word_embeddings"]:
        # One parameter of two names, which named_parameters gives by the first, the head's.
        named["lm_head.linear.weight"] = named.pop("transformer.wte.weight")
    return named


def adapters(model: nn.Module, config: dict) -> dict[str, Adapter]:
    found = {}
    for paths, block in zip(layer_paths(config), model.transformer.h, strict=True):
        layers = {
            "qkv_proj": [block.attn.qkv],
            "o_proj": [block.attn.proj],
            "gate_up_proj": [block.mlp.fc_1, block.mlp.fc_2],
            "down_proj": [block.mlp.proj],
        }
        for name, parts in layers.items():
            found[paths[name]] = Adapter([part.lora_A for part in parts], [part.lora_B for part in parts])
    return found


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids, lm_head_chunk_size=128)
    logits[-1] = logits[-1][..., :-1, :]
    return chunked_cross_entropy(logits, ids[..., 1:])
