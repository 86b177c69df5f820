"""The keys and values of tokens already seen, so that generating one more costs one token's work."""

import torch
from torch import Tensor

from minilora.phi3.config import Phi3Config


class KVCache:
    """Room for T_max rotated keys and values a layer, and the record of which are padding, which of one document.

    Args:
        batch: number of sequences, B.
        capacity: tokens that each may reach, T_max.

    Memory: 2 · layers · B · Hkv · T_max · D elements, taken at once.
    """

    def __init__(self, config: Phi3Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.documents = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.length = 0  # columns filled so far, padding included

    def clear(self) -> None:
        """Forgets all columns and keeps their room."""
        self.length = 0

    def extend(self, documents: Tensor) -> Tensor:
        """Makes room for the next columns, documents (B, T) numbering what they hold as Phi3ForCausalLM's attention_mask does;
        returns the record so far (B, length)."""
        length = self.length + documents.shape[1]
        if length > self.documents.shape[1]:
            raise ValueError(f"the cache holds {self.documents.shape[1]} tokens a sequence, and {length} were given")
        self.documents[:, self.length : length] = documents
        self.length = length
        return self.documents[:, : self.length]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, Hkv, T, D) in the columns just made room for; returns all so far (B, Hkv, length, D)."""
        start = self.length - k.shape[2]
        self.keys[layer, :, :, start : self.length] = k
        self.values[layer, :, :, start : self.length] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
