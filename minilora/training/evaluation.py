"""How well a model foretells the assistant's tokens of conversations that it is not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from minilora.data.encoding import Example, collate, count_targets
from minilora.training.distributed import of_this_rank, rank, summed, world_size


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over all target tokens, in nats a token, and its exponential."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Example], batch_size: int = 8, progress: bool = True) -> Evaluation:
    """Evaluates in eval mode and gives the model back in the mode that it had; every token weighs the same.

    Several processes share the work, and all get the result.

    Args:
        model: maps input_ids and labels (B, T) to the mean loss, as Phi3ForCausalLM does.

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError("evaluation needs at least one conversation")
    device = next(model.parameters()).device
    by_length = sorted(examples, key=lambda example: len(example.ids))  # less padding
    size = batch_size * world_size()
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    total, was_training = 0.0, model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=not progress or rank() > 0):
            part, counts = of_this_rank(batch)
            tensors = {name: tensor.to(device) for name, tensor in collate(part).items()}
            total += model(**tensors).item() * count_targets(part) * counts
    finally:
        model.train(was_training)
    tokens = count_targets(examples)
    loss = summed(total)[0] / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens)
