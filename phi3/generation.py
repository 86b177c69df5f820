"""Answers, token by token: prefill the prompts once, then feed back each token picked, with a cache of keys and values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.phi3.cache import KVCache
from minilora.phi3.config import Phi3Config
from minilora.phi3.model import Phi3ForCausalLM
from minilora.phi3.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked from the logits, and how many at most.

    Raises:
        ValueError: a field is out of its range; all faults at once.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  # divides the logits; 0 takes the likeliest token (greedy)
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach probability p (Holtzman et al. 2020)
    repetition_penalty: float = 1.0  # makes tokens seen before less likely above 1, more likely below (Keskar et al. 2019)
    seed: int = 0  # same seed, same answers

    def __post_init__(self):
        rules = {
            f"max_new_tokens must be at least 1, not {self.max_new_tokens}": self.max_new_tokens >= 1,
            f"temperature must be at least 0, not {self.temperature}": self.temperature >= 0,
            f"top_k must be at least 1, not {self.top_k}": self.top_k is None or self.top_k >= 1,
            f"top_p must lie in (0, 1], not {self.top_p}": self.top_p is None or 0 < self.top_p <= 1,
            f"repetition_penalty must lie in (0, inf), not {self.repetition_penalty}": 0 < self.repetition_penalty < math.inf,
        }
        faults = [rule for rule, holds in rules.items() if not holds]
        if faults:
            raise ValueError("; ".join(faults))


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id a row, (B,), from logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        likelier = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before each one already reach
        logits = logits.masked_fill((likelier >= sampling.top_p).scatter(-1, order, likelier >= sampling.top_p), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides the positive logits of tokens seen before by the penalty, and multiplies the negative ones, in float32.

    Args:
        logits: (B, V).
        seen: (B, V) bool, the tokens of each prompt and of its answer so far; padding is not seen.

    Source: Keskar et al. 2019, "CTRL", §4.1, whose division alone would make a negative logit likelier.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.no_grad()
def generate_ids(
    model: Phi3ForCausalLM, prompts: list[list[int]], stop_ids: frozenset[int], sampling: Sampling
) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token id of every prompt; None for those that have stopped.

    Prompts of unequal length are padded on the left and masked. A stop id is yielded, and is the last of its prompt.

    Raises:
        ValueError: there is no prompt, one is empty, or prompt and answer together pass max_position_embeddings.
    """
    longest = max(map(len, prompts), default=0)
    limit = model.config.max_position_embeddings
    if not prompts or not all(prompts):
        raise ValueError("generation needs at least one prompt, and no empty one")
    if longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"the prompt of {longest} tokens and {sampling.max_new_tokens} new ones pass the model's limit of {limit}: "
            "shorten the conversation or max_new_tokens"
        )
    device, B = model.lm_head.weight.device, len(prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, all so far)
    is_token = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = KVCache(model.config, B, longest + sampling.max_new_tokens, model.model.embed_tokens.weight.dtype, device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    running = [True] * B
    for _ in range(sampling.max_new_tokens):
        if _outgrown(model.config, is_token):
            cache.clear()
        unread = slice(cache.length, None)
        logits = model(ids[:, unread], attention_mask=is_token[:, unread], cache=cache, logits_to_keep=1)[:, 0]  # (B, V)
        picked = pick(penalise(logits, seen, sampling.repetition_penalty), sampling, generator)
        seen.scatter_(1, picked[:, None], True)
        step = [id_ if run else None for id_, run in zip(picked.tolist(), running, strict=True)]
        yield step
        running = [id_ is not None and id_ not in stop_ids for id_ in step]
        if not any(running):
            return
        ids, is_token = torch.cat([ids, picked[:, None]], dim=1), F.pad(is_token, (0, 1), value=1)


def _outgrown(config: Phi3Config, is_token: Tensor) -> bool:
    """Whether a sequence has just passed the context that LongRoPE's short factors are for: all its keys must turn anew."""
    return config.longrope is not None and (is_token.sum(dim=1) == config.original_max_position_embeddings + 1).any().item()


def generate_batch(model: Phi3ForCausalLM, tokenizer: Tokenizer, conversations: list[list[Message]], **settings) -> list[str]:
    """The answers to several conversations at once; settings are the fields of Sampling."""
    prompts = [tokenizer.encode_prompt(messages) for messages in conversations]
    steps = list(generate_ids(model, prompts, tokenizer.stop_ids, Sampling(**settings)))
    answers = zip(*steps, strict=True)
    return [tokenizer.decode([id_ for id_ in answer if id_ is not None and id_ not in tokenizer.stop_ids]) for answer in answers]


def generate(model: Phi3ForCausalLM, tokenizer: Tokenizer, messages: list[Message], **settings) -> str:
    """The answer to one conversation, [{"role": "user", "content": …}, …]; settings are the fields of Sampling."""
    return generate_batch(model, tokenizer, [messages], **settings)[0]


def stream(model: Phi3ForCausalLM, tokenizer: Tokenizer, messages: list[Message], **settings) -> Iterator[str]:
    """The same answer in pieces of text as they come; a character of several tokens comes whole."""
    ids, told, prompts = [], "", [tokenizer.encode_prompt(messages)]
    for (id_,) in generate_ids(model, prompts, tokenizer.stop_ids, Sampling(**settings)):
        if id_ not in tokenizer.stop_ids:
            ids.append(id_)
        text = tokenizer.decode(ids)
        if text != told and not text.endswith("\ufffd"):  # the sign for bytes that are no character, or none yet
            yield text[len(told) :]
            told = text
    if tokenizer.decode(ids) != told:
        yield tokenizer.decode(ids)[len(told) :]
