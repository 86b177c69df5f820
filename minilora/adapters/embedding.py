"""A table of embeddings with a low-rank adapter beside the frozen weight.

    y = W[ids] + scaling · lora_A[:, ids]ᵀ lora_Bᵀ

Source: loralib 0.1.2 and PEFT, whose shapes and start are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.layers import LoRALayer


class Embedding(LoRALayer, nn.Embedding):
    """An embedding with an adapter; padding_idx, max_norm and scale_grad_by_freq hold for lora_A as for the weight.

    There is no dropout, as in loralib and PEFT: ids have no elements to lose.

    Parameters:
        weight (num_embeddings, embedding_dim), lora_A (r, num_embeddings), lora_B (embedding_dim, r).
        lora_A starts at zero, so that the layer starts as the frozen one.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        **settings,
    ):
        super().__init__(num_embeddings, embedding_dim, **settings)
        self._adapt(r, lora_alpha, 0.0, use_rslora, lora_dtype)
        self.weight.requires_grad_(self.lora_A is None)

    def lora_shapes(self):
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def reset_lora_parameters(self) -> None:
        """lora_A zero and lora_B normal, which is PEFT's and loralib's start."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., embedding_dim)."""
        y = super().forward(ids)
        if not self._adds():
            return y
        # Not sparse: a sparse gradient cannot be transposed into one of lora_A.
        settings = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        s = F.embedding(ids, self.lora_A.T, *settings)  # (..., r)
        return (y + self.scaling * F.linear(s, self.lora_B)).to(y.dtype)

    def delta(self) -> Tensor:
        """(num_embeddings, embedding_dim)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).T
