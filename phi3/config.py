"""What a checkpoint's config.json says about the decoder, and what this decoder cannot do, refused by name."""

import dataclasses
import functools
import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from minilora.phi3.quantization import faults_of_config

# Fields that this decoder computes in one way only: any other value is another model.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "attention_dropout": (0.0,),
    "embd_pdrop": (0.0,),
    "resid_pdrop": (0.0,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "pretraining_tp": (1,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "layer_types": (None,),
}
QUANTIZATION = "quantization_config"  # says how weights are stored, and nothing about what the decoder computes
# Fields that change nothing of what the decoder computes.
WITHOUT_EFFECT = {
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "label2id",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "rope_parameters", "rope_scaling", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
ROPE_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # su, yarn: its early names
REFUSED_TYPES = {"phi3small": "Phi-3-small is another architecture (block-sparse attention)"}


@dataclass(frozen=True)
class LongRope:
    """The rotary settings of a model whose context was extended: minilora.phi3.rotary has the equation.

    Phi3Config checks them, since they must fit its sizes. Source: Ding et al. 2024, "LongRoPE".
    """

    short_factor: tuple[float, ...]  # stretches each wavelength in sequences that the original context holds; rotary_dim / 2
    long_factor: tuple[float, ...]  # the same in longer ones
    factor: float | None = None  # how much longer the context became; max / original_max_position_embeddings when None
    attention_factor: float | None = None  # multiplies cosine and sine; found from the above when None

    def __post_init__(self):
        for name in ("short_factor", "long_factor"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Phi3Config:
    """The sizes and constants of a Phi-3 decoder; field names and defaults are those of config.json.

    Raises:
        ValueError: the fields contradict one another; all contradictions at once.
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192  # width of gate and of up, each
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # as many as attention heads when None
    head_dim: int | None = None  # hidden_size / num_attention_heads when None
    max_position_embeddings: int = 4096  # tokens
    original_max_position_embeddings: int | None = None  # tokens before the context was extended; 4096 under LongRoPE when None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    partial_rotary_factor: float = 1.0  # share of head_dim that rotates
    longrope: LongRope | None = None  # config.json spells it rope_scaling or rope_parameters
    sliding_window: int | None = None  # keys that a query sees, itself included; all earlier ones when None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000

    def __post_init__(self):
        wrong = [*_mistyped(self), *(_mistyped(self.longrope) if isinstance(self.longrope, LongRope) else ())]
        if not wrong and self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.longrope and self.original_max_position_embeddings is None:
            object.__setattr__(self, "original_max_position_embeddings", 4096)
        faults = wrong or list(self._contradictions())
        if faults:
            raise ValueError("Phi3Config: " + "; ".join(faults))
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    def _contradictions(self):
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), or head_dim be given"
            )
        if self.partial_rotary_factor > 1 or self.rotary_dim % 2 or not self.rotary_dim:
            yield f"partial_rotary_factor ({self.partial_rotary_factor}) must leave an even share of head_dim to rotate"
        if self.longrope and self.original_max_position_embeddings == 1:
            yield "original_max_position_embeddings must be at least 2 under LongRoPE, not 1"
        for name in ("short_factor", "long_factor") if self.longrope else ():
            pairs, length = self.rotary_dim // 2, len(getattr(self.longrope, name))
            if length != pairs:
                yield f"{name} must hold {pairs} numbers, one for each pair of dimensions that rotates, not {length}"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for id_ in ids if isinstance(ids, list) else [ids]:
                if id_ is not None and not 0 <= id_ < self.vocab_size:
                    yield f"{name} {id_} must lie within the vocabulary of {self.vocab_size}"

    @functools.cached_property  # a plain number to torch.compile, not a formula in fields that dynamic=True varies
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotate; the rest pass through."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return int(head_dim * self.partial_rotary_factor)

    @property
    def qkv_sizes(self) -> dict[str, int]:
        """Rows of the fused qkv_proj, by the name of the projection that they stack, in order."""
        kv = self.num_key_value_heads * self.head_dim
        return {"q_proj": self.num_attention_heads * self.head_dim, "k_proj": kv, "v_proj": kv}

    @property
    def gate_up_sizes(self) -> dict[str, int]:
        """Rows of the fused gate_up_proj, likewise."""
        return {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size}

    @classmethod
    def read(cls, path: Path | str) -> "Phi3Config":
        """Reads config.json.

        Raises:
            ValueError: not JSON, another architecture, or fields that this decoder does not know or cannot honour, each by name.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object, not a {type(raw).__name__}")
        model_type = raw.get("model_type")
        if model_type != "phi3":
            why = REFUSED_TYPES.get(model_type, "this is a Phi-3 decoder")
            raise ValueError(f'{path}: model_type must be "phi3", not {model_type!r}: {why}')
        known = {field.name for field in dataclasses.fields(cls)} - {"longrope"}
        rope, faults = _rope_fields(raw)
        faults += faults_of_config(raw.get(QUANTIZATION))
        for name, value in raw.items():
            if name in FIXED and value not in FIXED[name]:
                faults.append(f"{name} must be {' or '.join(map(repr, FIXED[name]))}, not {value!r}")
            elif not (name in known or name in {*FIXED, *WITHOUT_EFFECT, QUANTIZATION} or name.startswith("_")):
                faults.append(f"{name} is unknown, and may change what the model computes")
        if faults:
            raise ValueError(f"{path} asks for what this decoder does not do: " + "; ".join(faults))
        try:
            return cls(**{name: raw[name] for name in known & raw.keys()} | rope)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path | str, dtype: str, quantization: dict | None = None) -> None:
        """Writes config.json as transformers reads it.

        Args:
            dtype: names the weights' type, "bfloat16" say.
            quantization: quantization_config, where some are 4-bit.
        """
        fixed = {name: values[0] for name, values in FIXED.items() if name != "layer_types"}
        raw = dataclasses.asdict(self) | fixed
        rope = {name: value for name, value in (raw.pop("longrope") or {}).items() if value is not None}
        raw |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "torch_dtype": dtype}
        raw["rope_scaling"] = {"type": "longrope"} | rope if rope else None
        if self.original_max_position_embeddings is None:
            raw["original_max_position_embeddings"] = self.max_position_embeddings
        if quantization:
            raw[QUANTIZATION] = quantization
        Path(path).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _mistyped(config: Phi3Config | LongRope) -> Iterator[str]:
    """What is wrong with each field's value by its type alone."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        if value is None and type(None) in kinds:
            continue
        if field.name.endswith("_token_id"):
            several = isinstance(value, list) and list[int] in kinds
            right, must = all(type(id_) is int for id_ in (value if several else [value])), "a token id"
        elif field.name in ("short_factor", "long_factor"):
            right, must = isinstance(value, tuple) and all(map(_is_positive, value)), "a list of positive numbers"
        elif field.type is bool:
            right, must = type(value) is bool, "true or false"
        elif float in kinds:
            right, must = _is_positive(value), "a positive number"
        elif int in kinds:
            right, must = type(value) is int and value >= 1, "a positive integer"
        else:
            right, must = isinstance(value, LongRope), "a LongRope"
        if not right:
            yield f"{field.name} must be {must}, not {reprlib.repr(value)}"


def _is_positive(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _rope_fields(raw: dict) -> tuple[dict, list[str]]:
    """The rotary settings, from the top and from `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    places = {"at the top": {name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in raw}}
    rope, place_of, faults = {}, {}, []
    for spelling in ("rope_scaling", "rope_parameters"):
        places[f"in {spelling}"], wrong = _rope_settings(spelling, raw.get(spelling) or {})
        faults += wrong
    for place, settings in places.items():
        for name, value in settings.items():
            if name in rope and rope[name] != value:
                one, other = reprlib.repr(rope[name]), reprlib.repr(value)  # some are long lists
                faults.append(f"{name} is {one} {place_of[name]} and {other} {place}: they must agree")
            else:
                rope[name], place_of[name] = value, place
    longrope = {field.name: rope.pop(field.name, None) for field in dataclasses.fields(LongRope)}
    if rope.pop("rope_type", None) == "longrope":
        faults += [f"LongRoPE needs {name}" for name in ("short_factor", "long_factor") if longrope[name] is None]
        rope["longrope"] = LongRope(**longrope)
    if raw.get("original_max_position_embeddings") is not None:  # transformers gives the top priority
        rope.pop("original_max_position_embeddings", None)
    return rope, faults


def _rope_settings(spelling: str, settings: dict) -> tuple[dict, list[str]]:
    """The settings that one spelling holds, its type by its present name, nulls left out; and what cannot be honoured."""
    if not isinstance(settings, dict):
        return {}, [f"{spelling} must be an object or null, not {settings!r}"]
    known = {field.name for field in dataclasses.fields(LongRope)}
    known |= {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    faults = [f"{spelling}.{name} is unknown, and may change what the model computes" for name in settings if name not in known]
    read = {name: value for name, value in settings.items() if name in known - {"type"} and value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in list(ROPE_TYPES):  # a list, since anything may come, unhashable too
        faults.append(f"{spelling} must be null or of a type among {', '.join(ROPE_TYPES)}, not {kind!r}")
    elif settings:
        read["rope_type"] = ROPE_TYPES[kind]
    return read, faults
