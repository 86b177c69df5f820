"""loralib's linear layers in a plain decoder: the shortest Phi-3 that trains, in operations of PyTorch alone."""

import loralib
import torch
import torch.nn.functional as F
from side import Adapter, Settings, layer_paths, put, read_weights
from torch import Tensor, nn


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: dict, settings: Settings):
        super().__init__()
        C, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741 (the width of the MLP)
        self.heads = config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]
        self.D = config["head_dim"]
        lora = {"r": settings.r, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": False}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = loralib.Linear(C, sum(self.heads) * self.D, **lora)
        self.self_attn.o_proj = loralib.Linear(self.heads[0] * self.D, C, **lora)
        self.mlp.gate_up_proj = loralib.Linear(C, 2 * I, **lora)
        self.mlp.down_proj = loralib.Linear(I, C, **lora)
        self.input_layernorm = nn.RMSNorm(C, config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(C, config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = self.self_attn.qkv_proj(self.input_layernorm(x)).view(B, T, -1, self.D).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, heads of each, T, D)
        q, k = (u * cos + torch.cat([-u[..., self.D // 2 :], u[..., : self.D // 2]], dim=-1) * sin for u in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads[0] != self.heads[1])
        x = x + self.self_attn.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.mlp.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.mlp.down_proj(F.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids (B, T) to logits (B, T, V), under the parameter names of the checkpoint."""

    def __init__(self, config: dict, settings: Settings):
        super().__init__()
        C, V = config["hidden_size"], config["vocab_size"]
        self.D, self.theta = config["head_dim"], config["rope_theta"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(Layer(config, settings) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(C, config["rms_norm_eps"])
        self.lm_head = nn.Linear(C, V, bias=False)
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        frequencies = self.theta ** -(torch.arange(0, self.D, 2) / self.D)
        angles = torch.outer(torch.arange(ids.shape[1]), frequencies).repeat(1, 2)  # (T, D)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.lm_head(self.model.norm(x))


def build(folder: str, config: dict, settings: Settings) -> nn.Module:
    model = put(Decoder(config, settings), read_weights(folder))
    loralib.mark_only_lora_as_trainable(model)
    return model.train()


def adapters(model: nn.Module, config: dict) -> dict[str, Adapter]:
    layers = {path: model.get_submodule(path) for paths in layer_paths(config) for path in paths.values()}
    return {path: Adapter([layer.lora_A], [layer.lora_B]) for path, layer in layers.items()}


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
