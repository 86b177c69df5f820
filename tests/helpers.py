"""Measures and makers that several tests share."""

import dataclasses
import json
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.data.encoding import Example
from minilora.phi3 import Phi3Config, Phi3ForCausalLM

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}  # after the 256 bytes
VOCABULARY = 260  # of the tiny model: one id more than the tiny tokenizer has, as published checkpoints round theirs up
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rms_error(actual: Tensor, reference: Tensor) -> float:
    """RMS(actual − reference) / RMS(reference): 1 for zeros, whatever the scale of the reference; 0 where both are zero."""
    assert actual.shape == reference.shape, f"{tuple(actual.shape)} is compared with {tuple(reference.shape)}"
    actual, reference = actual.detach().double(), reference.detach().double()
    error = torch.linalg.vector_norm(actual - reference)
    return float(error / torch.linalg.vector_norm(reference)) if error else 0.0


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """max |Δ| as a share of the range of the expected values."""
    return float((actual.double() - expected.double()).abs().max() / (expected.max() - expected.min()))


def outputs_and_gradients(layer: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y and the gradients of a loss that weighs every output differently: x's and every trained parameter's, by its name."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {
        name.rpartition(".")[2]: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad
    }
    return {"y": y, **({"x": x.grad} if x.grad is not None else {}), **gradients}


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of all matrix products run under it, those of backward included."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            a, b = args[-2:]  # (…, m, k), (…, k, n)
            self.count += a.numel() * b.shape[-1]
        return function(*args, **kwargs or {})


def profiled(run, **what):
    """The profile of a call: what torch runs within operations of our own too, which no dispatch mode sees."""
    with profile(activities=[ProfilerActivity.CPU], **what) as found:
        run()
    return found


def multiplications(run) -> int:
    """Of all matrix products of a call."""
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # where the two factors begin, (m, k) and (k, n)
    events = [event for event in profiled(run, record_shapes=True).events() if event.name in first]
    factors = [event.input_shapes[first[event.name] :][:2] for event in events]
    return sum(m * k * n for (m, k), (_, n) in factors)


def peak_bytes(run) -> int:
    """All that torch allocates in a call, at its most."""
    return max(accumulate(_allocations(run)), default=0)


def held_bytes(run) -> int:
    """What torch allocates in a call and what it returns holds on to, its graph included."""
    held = []
    return sum(_allocations(lambda: held.append(run())))


def _allocations(run) -> list[int]:
    """Bytes that are taken and, below 0, given back, in their order."""
    events = profiled(run, profile_memory=True).profiler.kineto_results.events()
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"]


def tiny_config(**fields) -> Phi3Config:
    """Sizes that a test can afford, with two query heads to a key head; fields replace them."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": SPECIAL["<|im_end|>"],
        "pad_token_id": SPECIAL["<|endoftext|>"],
    }
    return Phi3Config(**sizes | fields)


def tiny_model(config: Phi3Config, seed: int = 0) -> Phi3ForCausalLM:
    """A random decoder in float32, in eval mode; norm weights are random too, so that a forgotten one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def examples(count=8) -> list[Example]:
    """Conversations of random tokens, of unlike lengths and with unlike numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = 6 + 3 * (i % 5)
        ids = torch.randint(256, (length,), generator=generator).tolist()
        learnt = 1 + (7 * i) % (length - 1)
        made.append(Example(ids, [False] * (length - learnt) + [True] * learnt))
    return made


def as_transformers_has_it(config: Phi3Config) -> tuple[dict, dict]:
    """The fields of a config as transformers 5 names them, and its rope_parameters."""
    fields = dataclasses.asdict(config)
    rope = {name: fields.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    longrope = {name: value for name, value in (fields.pop("longrope") or {}).items() if value is not None}
    if not longrope:
        return fields, rope | {"rope_type": "default"}
    longrope |= {"rope_type": "longrope", "original_max_position_embeddings": config.original_max_position_embeddings}
    return fields, rope | longrope | {name: list(longrope[name]) for name in ("short_factor", "long_factor")}


def load_in_transformers(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"):
    """The Phi3ForCausalLM of transformers with the weights in folder, which must be all that it needs and no more."""
    import transformers  # takes seconds, which tests without it are spared

    transformers.utils.logging.disable_progress_bar()
    theirs, info = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return theirs.eval()


def write_tokenizer(folder: Path, template: str = CHATML, **settings) -> None:
    """Writes a byte-level tokenizer without merges (a token a byte) with ChatML's tokens; settings go to its config."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    file = TokenizerFile(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    file.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    assert {text: file.token_to_id(text) for text in SPECIAL} == SPECIAL
    folder.mkdir(parents=True, exist_ok=True)
    file.save(str(folder / "tokenizer.json"))
    raw = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    } | settings
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw), encoding="utf-8")
