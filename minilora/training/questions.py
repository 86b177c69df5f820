"""What a model is asked when it is evaluated, and its answers beside those that are wanted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from tqdm import tqdm

from minilora.data.conversations import Conversation, Message
from minilora.training.metrics import METRICS


@dataclass(frozen=True)
class Sample:
    """One answer of a model."""

    question: str  # the turn before it
    wanted: str
    answer: str


@dataclass(frozen=True)
class Questions:
    """Conversations whose last turn of the assistant a model is to find by itself.

    Args:
        generate: the answers of a model, as partial(phi3.generate_batch, tokenizer=tokenizer) gives them.
    """

    conversations: Sequence[Conversation]
    generate: Callable[..., list[str]]  # (model, conversations=…, max_new_tokens=…)

    def ask(self, model: nn.Module, max_new_tokens: int, batch_size: int = 8, progress: bool = True) -> list[Sample]:
        """The model's answers, in eval mode; it comes back in the mode that it had."""
        asked = [_split(conversation.messages) for conversation in self.conversations]
        prompts, samples, was_training = [prompt for prompt, _ in asked], [], model.training
        starts = tqdm(range(0, len(asked), batch_size), desc="answer", unit="batch", leave=False, disable=not progress)
        model.eval()
        try:
            with torch.no_grad():
                for start in starts:
                    chosen = slice(start, start + batch_size)
                    answers = self.generate(model, conversations=prompts[chosen], max_new_tokens=max_new_tokens)
                    for (prompt, wanted), answer in zip(asked[chosen], answers, strict=True):
                        samples.append(Sample(prompt[-1]["content"] if prompt else "", wanted, answer))
        finally:
            model.train(was_training)
        return samples


def _split(messages: list[Message]) -> tuple[list[Message], str]:
    """The turns before the assistant's last one, and that one's text."""
    turn = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:turn], messages[turn]["content"]


def measure(samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, float]:
    """The metrics named, of minilora.training.metrics, as eval_NAME."""
    answers, wanted = [sample.answer for sample in samples], [sample.wanted for sample in samples]
    return {f"eval_{name}": METRICS[name](answers, wanted) for name in metrics}


def told(samples: Sequence[Sample]) -> list[dict[str, str]]:
    """The samples as a line of the log holds them."""
    return [asdict(sample) for sample in samples]
