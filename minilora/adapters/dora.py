"""DoRA: the adapter turns the rows of the weight, and a trained magnitude sets their lengths.

    y = m ⊙ (W + s B A) x / ‖W + s B A‖ + bias        norm of each row, (N,); m starts at ‖W‖

The norm is a constant to the gradient (§4.3 there, as in PEFT), and comes without a dense W + s B A, from products of rank r
(by blocks of rows, where W is 4-bit):

    ‖W_i + s B_i A‖² = ‖W_i‖² + 2 s B_i · (W_i Aᵀ) + s² B_i (A Aᵀ) B_iᵀ

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5, §4.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapters.four_bit import dense, row_blocks, row_lengths
from minilora.adapters.layers import MergedLinear, spread
from minilora.kernels.lora_linear import lora_linear


class DoraLinear(MergedLinear):
    """A linear layer with a DoRA adapter on each enabled slice; rows outside the slices are those of the frozen layer.

    Dropout acts as in PEFT, on all that the magnitude scales: with x' = drop(x),

        y = W (x − x') + m / ‖W + s B A‖ ⊙ (W + s B A) x' + bias

    Parameters:
        lora_A, lora_B as in MergedLinear; lora_magnitude_vector (outputs of the enabled slices,). It starts from the weight:
        call reset_lora_parameters after loading another one.
    """

    def _make_adapter(self, like: Tensor) -> None:
        self.lora_magnitude_vector = nn.Parameter(like.new_empty(sum(stop - start for start, stop in self.slices)))
        super()._make_adapter(like)

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.norms())  # B is zero

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The length of each row of W + s B A within the slices, in float32 or better."""
        dtype, s, squares = torch.promote_types(self.lora_A.dtype, torch.float32), self.scaling, []
        A, B = self.lora_A.chunk(len(self.slices)), self.lora_B.split([stop - start for start, stop in self.slices])
        for (start, stop), A_g, B_g in zip(self.slices, A, B, strict=True):
            gram = A_g.to(dtype) @ A_g.to(dtype).T  # (r, r)
            for rows, W_i in row_blocks(self.matrix, start, stop):
                products, B_i = (W_i @ A_g.to(W_i.dtype).T).to(dtype), B_g[rows].to(dtype)  # (rows, r) both
                square = torch.linalg.vector_norm(W_i, dim=1, dtype=dtype).square()
                squares.append(square + (B_i * (2 * s * products + s * s * (B_i @ gram))).sum(dim=1))
        # A row of zeros, as padded vocabularies have, stays one: 0 / tiny, where 0 / 0 would be NaN.
        return torch.cat(squares).clamp_min(torch.finfo(dtype).tiny).sqrt()

    def gains(self) -> Tensor:
        """m / ‖W + s B A‖, one for each row within the slices."""
        return self.lora_magnitude_vector / self.norms()

    def magnitudes(self) -> Tensor:
        """m of every row of the weight; outside the slices the row's own length, which changes nothing."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return spread(self.lora_magnitude_vector.detach(), self.slices, row_lengths(self.matrix.detach(), dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self._adds():
            return super().forward(x)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        turned = lora_linear(dropped, self.matrix, self.lora_A, self.lora_B, self.scaling, slices=self.slices)
        gains = spread(self.gains(), self.slices, torch.ones(self.out_features, device=x.device))
        y = turned * gains if self.bias is None else turned * gains + self.bias
        if self.training and self.lora_dropout:
            y = y + F.linear(x - dropped, self.matrix)
        return y.to(turned.dtype)  # rounded once: gains near 1 need more digits than bfloat16 has

    def delta(self) -> Tensor:
        change = super().delta()
        matrix = dense(self.matrix, change.dtype)
        rows = torch.cat([matrix[start:stop] for start, stop in self.slices])
        return self.gains()[:, None] * (rows + change) - rows
