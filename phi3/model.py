"""The Phi-3 decoder: embedding, N × (attention, SwiGLU) with RMSNorm before each, and the vocabulary head.

Letters: B sequences, T tokens, C hidden size, H query heads, Hkv key and value heads, D head size, I MLP width, V vocabulary.
Module and parameter names are those of the published checkpoints. Source: Abdin et al. 2024, "Phi-3 Technical Report", §2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.kernels.arithmetic import product_dtype
from minilora.kernels.cross_entropy import IGNORE, head_cross_entropy
from minilora.kernels.linear import Linear
from minilora.kernels.remade import remade
from minilora.kernels.rms_norm import add_rms_norm, rms_norm
from minilora.kernels.rope import rope
from minilora.kernels.swiglu import swiglu
from minilora.phi3.cache import KVCache
from minilora.phi3.config import Phi3Config
from minilora.phi3.rotary import rotary_tables


class PackedLinear(Linear):
    """A linear layer without bias whose rows stack several projections: `packed` maps each one's name to its rows, in order."""

    def __init__(self, in_features: int, packed: dict[str, int]):
        super().__init__(in_features, sum(packed.values()), bias=False)
        self.packed = packed


class RMSNorm(nn.Module):
    """The sum h = x + delta, and h / sqrt(mean(h²) + ε) times a weight: both. Source: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if delta is None:
            return x, self.normed(x)
        return add_rms_norm(x, delta, self.weight, self.eps)

    def normed(self, h: Tensor) -> Tensor:
        return rms_norm(h, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query causal attention: H / Hkv query heads share a key and value head. Source: Ainslie et al. 2023."""

    def __init__(self, config: Phi3Config, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = PackedLinear(config.hidden_size, config.qkv_sizes)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = rope(self.qkv_proj(x), *rotary, self.heads, self.kv_heads)  # (B, H, T, D), (B, Hkv, T, D) twice
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Hkv, all so far, D)
        causal = mask is None
        if T == 1:  # a branch, since torch.compile may hold T as a symbol, and T > 1 would be one
            causal = False  # one new token sees all
        wide = (tensor.to(product_dtype(x.dtype, x.device)) for tensor in (q, k, v))  # SDPA has no such care of its own
        y = F.scaled_dot_product_attention(*wide, mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))


class MLP(nn.Module):
    """down(up(x) ⊙ silu(gate(x))). Source: Shazeer 2020, "GLU Variants", eq. 6."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.gate_up_proj = PackedLinear(config.hidden_size, config.gate_up_sizes)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.gate_up_proj(x)  # (B, T, 2·I)
        y = swiglu(packed)  # (B, T, I)
        with remade(y, swiglu, packed):
            return self.down_proj(y)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each sum waits for the norm after it: x and delta stand for x + delta."""

    def __init__(self, config: Phi3Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        x, y = self.input_layernorm(x, delta)
        with remade(y, self.input_layernorm.normed, x):
            delta = self.self_attn(y, rotary, mask, cache)
        x, y = self.post_attention_layernorm(x, delta)
        with remade(y, self.post_attention_layernorm.normed, x):
            return x, self.mlp(y)


class Phi3Model(nn.Module):
    """The decoder without its head: token ids to hidden states."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # when training: keep each layer's input only, and compute the rest again in backward
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Args and errors as in Phi3ForCausalLM.forward; returns (B, T, C)."""
        if cache is not None:
            documents = cache.extend(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
            attention_mask = None if (documents == 1).all() else documents  # (B, all so far)
        x, delta = self.embed_tokens(input_ids), None  # (B, T, C)
        positions, lengths, mask = self._layout(input_ids, attention_mask, cache, product_dtype(x.dtype, x.device))
        rotary = rotary_tables(self.config, positions, lengths, x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = x if delta is None else x + delta  # one tensor to keep, not two
                x, delta = checkpoint(layer, x, None, rotary, mask, cache, use_reentrant=False)
            else:
                x, delta = layer(x, delta, rotary, mask, cache)
        return self.norm(x, delta)[1]

    def _layout(self, input_ids: Tensor, documents: Tensor | None, cache: KVCache | None, dtype: torch.dtype):
        """Where every token stands in its document: positions (B or 1, T), the documents' lengths so far (B or 1, T or 1),
        and the mask (B or 1, 1, T, keys) to add to the scores, 0 or −∞ in dtype, since SDPA would make a boolean one such
        in every layer; None for plain causal."""
        T, device = input_ids.shape[1], input_ids.device
        keys = T if cache is None else cache.length
        column = torch.arange(keys, device=device)
        query = column[keys - T :]
        window = self.config.sliding_window
        if documents is None and T in (1, keys) and (window is None or keys <= window):
            # One new token sees all; a whole sequence is SDPA's own causal case, which needs no T × T mask.
            positions, lengths, cached, mask = query[None], column.new_full((1, 1), keys), column.new_full((1, 1), keys - T), None
        else:
            documents = column.new_ones(1, keys) if documents is None else documents
            same = documents[:, keys - T :, None] == documents[:, None]  # (B, T, keys); padding is a document that nobody reads
            distance = query[:, None] - column  # (T, keys)
            positions = (same & (distance >= 0)).sum(dim=-1) - 1
            lengths, cached = same.sum(dim=-1), same[..., : keys - T].sum(dim=-1)
            seen = same & (distance >= 0) & (distance < (window or keys))
            mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
        self._check_one_table(cached, lengths)
        return positions, lengths, mask

    def _check_one_table(self, cached: Tensor, lengths: Tensor) -> None:
        """Refuses to add queries turned by LongRoPE's long factors to cached keys turned by the short ones."""
        L = self.config.original_max_position_embeddings
        if self.config.longrope and ((cached > 0) & (cached <= L) & (lengths > L)).any():
            raise ValueError(
                f"a sequence in the cache grows past {L} tokens (original_max_position_embeddings), where LongRoPE changes its "
                "factors: clear the cache, and give all tokens again in one call"
            )


class Phi3ForCausalLM(nn.Module):
    """The decoder with its vocabulary head, which is the embedding itself when config.tie_word_embeddings."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.config = config
        self.model = Phi3Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter where the config says that they are."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits of the next token at every position; or, given labels, the mean loss, without ever holding full logits.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64: labels[:, t] is what input_ids[:, t] should have been foretold as; −100 asks for no loss.
            attention_mask: (B, T) int64, 1 for tokens, 0 for padding (on the left when generating); all tokens when None.
                Documents packed into one row carry the numbers 1, 2, 3, … in place of 1, each on all of its tokens: they
                neither see nor foretell one another, and each starts at position 0.
            cache: keys and values of earlier calls; these T tokens follow them and are added.
            logits_to_keep: only the last so many positions get logits; 0 for all.

        Returns:
            (B, T, V), or (B, logits_to_keep, V), in the weights' dtype; or a float32 scalar.

        Raises:
            ValueError: no label asks for a loss; the cache is full, or holds keys that LongRoPE turned for a shorter sequence.
        """
        x = self.model(input_ids, attention_mask, cache)  # (B, T, C)
        if labels is None:
            return self.lm_head(x[:, -logits_to_keep:])
        ahead = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T): the token after each
        if attention_mask is not None:
            ahead = ahead.masked_fill(attention_mask != F.pad(attention_mask[:, 1:], (0, 1)), IGNORE)  # of another document
        return head_cross_entropy(self.lm_head, x.flatten(0, 1), ahead.flatten())
