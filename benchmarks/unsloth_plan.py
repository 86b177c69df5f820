"""The launches of a Phi-3 step as Unsloth plans them, on no device: what its public sources do, written down to be counted.

Assumed, of Unsloth's kernels as published in 2025 (unsloth/kernels: fast_lora, rms_layernorm, rope_embedding, swiglu,
cross_entropy_loss) with a 16-bit base, no dropout, no activation checkpointing:

    - Phi-3's packed projections are split, as in the checkpoints that it publishes: q, k, v, gate and up have each an adapter of
      rank r, and a product of their own;
    - a projection is x Wᵀ, x Aᵀ, and the update added into the first in place (addmm); A and B are float32, and are
      rounded to bfloat16 at each use;
    - the autograd functions of q, k, v together, of o, and of the MLP find dA and dB by products, and dX by products that
      add in place, the first into the memory of x;
    - RMSNorm, the rotary embedding (in place, q and k in a launch each), SwiGLU (its backward in place, h made again) and
      cross-entropy (in place, on full 16-bit logits) are one Triton launch each way;
    - residual sums are torch's, forward and backward; attention is flash attention.
"""

import torch
from torch import Tensor

from minilora.phi3 import Phi3Config
from tests.without_gpu import Traffic

DTYPE = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Projection:
    """A frozen weight (N, K) with an adapter."""

    def __init__(self, N: int, K: int, r: int):
        self.weight, self.A, self.B = empty(N, K), empty(r, K, dtype=torch.float32), empty(N, r, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).addmm_(x @ self.A.to(DTYPE).T, self.B.to(DTYPE).T)

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """Finds dA and dB; adds to dx, or starts it."""
        A, B = self.A.to(DTYPE), self.B.to(DTYPE)
        torch.empty_like(A.T).addmm_(x.T, dy @ B, beta=0)
        torch.empty_like(B.T).addmm_(A @ x.T, dy, beta=0)
        dx = dy @ self.weight if dx is None else dx.addmm_(dy, self.weight)
        return dx.addmm_(dy @ B, A)

    def accumulate(self) -> None:
        """The gradients in bfloat16 become those of the parameters in float32."""
        for parameter in (self.A, self.B):
            empty(*parameter.shape).to(torch.float32)


class Step:
    """Forward and backward of a model, for one sequence of T tokens."""

    def __init__(self, config: Phi3Config, T: int, r: int, traffic: Traffic):
        C, I, V = config.hidden_size, config.intermediate_size, config.vocab_size  # noqa: E741
        q, k, v = config.qkv_sizes.values()
        self.config, self.T, self.traffic = config, T, traffic
        self.q, self.k, self.v, self.o = (Projection(N, K, r) for N, K in ((q, C), (k, C), (v, C), (C, q)))
        self.gate, self.up, self.down = Projection(I, C, r), Projection(I, C, r), Projection(C, I, r)
        self.table, self.head, self.ids = empty(V, C), empty(V, C), empty(T, dtype=torch.int64)

    @property
    def projections(self) -> list[Projection]:
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    def run(self) -> None:
        x = torch.nn.functional.embedding(self.ids, self.table)
        for _ in range(self.config.num_hidden_layers):
            self.layer(x)
        self.norm(x)
        logits = x @ self.head.T
        self.fused("cross_entropy_kernel", logits)
        self.fused("cross_entropy_backward_kernel", logits, logits)
        dx = logits @ self.head
        self.norm_backward(dx, x)
        for _ in range(self.config.num_hidden_layers):
            self.layer_backward(dx, x)

    def fused(self, kernel: str, *tensors: Tensor) -> None:
        """A Triton launch: every tensor is read or written once, one that is both is given twice."""
        self.traffic.add(kernel, tensors)

    def norm(self, x: Tensor) -> Tensor:
        self.fused("rms_norm_kernel", x, x)
        return x

    def norm_backward(self, dy: Tensor, x: Tensor) -> None:
        self.fused("rms_norm_backward_kernel", dy, x, dy)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(1, self.T, -1, self.config.head_dim).transpose(1, 2)  # (1, H, T, D)

    def rope(self, q: Tensor, k: Tensor) -> None:
        self.fused("rope_kernel", q, q)
        self.fused("rope_kernel", k, k)

    def attention(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        self.rope(q, k)
        # q, k, v, the result and the logarithms of its sums
        return q, k, v, *torch.ops.aten._scaled_dot_product_flash_attention(*map(self.heads, (q, k, v)), 0.0, True)[:2]

    def layer(self, x: Tensor) -> None:
        y = self.attention(self.norm(x))[3]
        x + self.o(y.transpose(1, 2).reshape(self.T, -1))
        x + self.mlp(self.norm(x))

    def mlp(self, x: Tensor) -> Tensor:
        e, g, h = self.gate(x), self.up(x), empty(self.T, self.config.intermediate_size)
        self.fused("swiglu_kernel", e, g, h)
        return self.down(h)

    def layer_backward(self, dy: Tensor, x: Tensor) -> None:
        self.norm_backward(self.mlp_backward(dy, x), x)
        dy + dy
        self.norm_backward(self.attention_backward(dy, x), x)
        dy + dy
        for projection in self.projections:
            projection.accumulate()

    def mlp_backward(self, dy: Tensor, x: Tensor) -> Tensor:
        e, g = (empty(self.T, self.config.intermediate_size) for _ in "eg")
        A, B = self.down.A.to(DTYPE), self.down.B.to(DTYPE)
        dh = (dy @ self.down.weight).addmm_(dy @ B, A)
        self.fused("swiglu_backward_kernel", dh, e, g, dh, e, g)  # which become h, the gradient of up and that of gate
        torch.empty_like(A.T).addmm_(dh.T, dy @ B, beta=0)
        torch.empty_like(B.T).addmm_(A @ dh.T, dy, beta=0)
        return self.gate.backward(g, x, self.up.backward(e, x))

    def attention_backward(self, dy: Tensor, x: Tensor) -> Tensor:
        q, k, v, y = (self.heads(empty(self.T, self.o.weight.shape[1])) for _ in "qkvy")
        sums = empty(1, self.config.num_attention_heads, self.T, dtype=torch.float32)
        d = self.heads(self.o.backward(dy, y.transpose(1, 2).reshape(self.T, -1)))
        state = empty(2, dtype=torch.int64), empty(dtype=torch.int64)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d, q, k, v, y, sums, None, None, self.T, self.T, 0.0, True, *state
        )
        self.rope(dq, dk)
        dq, dk, dv = (t.transpose(1, 2).reshape(self.T, -1) for t in (dq, dk, dv))
        return self.v.backward(dv, x, self.k.backward(dk, x, self.q.backward(dq, x)))
