"""How well a model foretells the assistant's tokens of conversations that it is not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from minilora.data import Example, collate
from minilora.kernels.cross_entropy import IGNORE


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over all target tokens, in nats a token, and its exponential."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Example], batch_size: int = 8, progress: bool = True) -> Evaluation:
    """Evaluates in eval mode and gives the model back in the mode that it had; every token weighs the same.

    Args:
        model: maps input_ids and labels (B, T) to the mean loss, as Phi3ForCausalLM does.

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError("evaluation needs at least one conversation")
    device = next(model.parameters()).device
    by_length = sorted(examples, key=lambda example: len(example.ids))  # less padding
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    total, tokens, was_training = 0.0, 0, model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=not progress):
            tensors = collate(batch)
            count = int((tensors["labels"][:, 1:] != IGNORE).sum())
            total += model(**{name: tensor.to(device) for name, tensor in tensors.items()}).item() * count
            tokens += count
    finally:
        model.train(was_training)
    loss = total / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens)
