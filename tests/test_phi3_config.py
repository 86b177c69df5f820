"""Reading config.json: what is supported is read exactly, everything else is refused by name."""

import dataclasses
import json
import math
import re

import pytest
import transformers
from helpers import as_transformers_has_it, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from minilora.phi3.config import FIXED, LongRope, Phi3Config

MINI = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 96, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "longrope": None,
}  # fmt: skip
MEDIUM = {
    "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 10, "head_dim": 128,
}  # fmt: skip
PHI4 = {
    "vocab_size": 100352, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000,
    "sliding_window": None, "bos_token_id": 100257, "eos_token_id": 100257, "pad_token_id": 100257,
}  # fmt: skip


def write_raw(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "phi3"} | fields), encoding="utf-8")
    return path


def test_absent_fields_take_the_defaults_of_transformers(tmp_path):
    config, theirs = Phi3Config.read(write_raw(tmp_path)), transformers.Phi3Config()
    assert config == Phi3Config()
    assert (config.head_dim, config.num_key_value_heads) == (96, 32)
    ours = dataclasses.asdict(config)
    rope = {name: ours.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    assert rope | {"rope_type": "default"} == theirs.rope_parameters
    for name in ("head_dim", "original_max_position_embeddings", "longrope"):  # derived, and of LongRoPE only
        del ours[name]
    assert {name: getattr(theirs, name) for name in ours} == ours


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Phi-3-mini-4k-instruct", MINI), ("Phi-3-medium-4k-instruct", MINI | MEDIUM), ("phi-4", MINI | MEDIUM | PHI4)],
)
def test_the_published_configs_without_longrope_are_read(shared, name, expected):
    assert dataclasses.asdict(Phi3Config.read(shared / "configs" / f"{name}.json")) == expected


EXTENDED = {"max_position_embeddings": 131072, "sliding_window": 262144}
VISION = MINI | EXTENDED | {"sliding_window": 131072, "eos_token_id": 2}
PHI4_MINI = MINI | EXTENDED | {
    "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True, "bos_token_id": 199999, "eos_token_id": 200020, "pad_token_id": 199999,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi-3.5-mini-instruct", MINI | EXTENDED),
        ("Phi-4-mini-instruct", PHI4_MINI),
        ("Phi-3-vision-128k-instruct.text", VISION),  # spells it "su"
    ],
)
def test_the_published_configs_with_longrope_are_read(shared, name, expected):
    path = shared / "configs" / f"{name}.json"
    config, rope = Phi3Config.read(path), json.loads(path.read_text())["rope_scaling"]
    assert config.longrope == LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]))
    assert len(config.longrope.long_factor) == 48
    assert dataclasses.asdict(dataclasses.replace(config, longrope=None)) == expected


def test_sizes_of_the_stacked_projections_follow_the_heads():
    config = tiny_config(num_attention_heads=6, num_key_value_heads=2, head_dim=10, intermediate_size=7)
    assert list(config.qkv_sizes.items()) == [("q_proj", 60), ("k_proj", 20), ("v_proj", 20)]
    assert list(config.gate_up_sizes.items()) == [("gate_proj", 7), ("up_proj", 7)]
    assert tiny_config(head_dim=10, partial_rotary_factor=0.45).rotary_dim == 4


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"rope_type": "default"}, {"type": "default"}, {}])
def test_both_spellings_of_the_rotary_settings_are_read(tmp_path, spelling, kind):
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = Phi3Config.read(write_raw(tmp_path, **{spelling: kind | rope}))
    assert (config.rope_theta, config.partial_rotary_factor) == (500.0, 0.5)


def test_rotary_settings_at_the_top_are_read(tmp_path):
    config = Phi3Config.read(write_raw(tmp_path, rope_theta=500.0, partial_rotary_factor=0.5, rope_scaling=None))
    assert (config.rope_theta, config.partial_rotary_factor) == (500.0, 0.5)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_that_disagree_are_refused(tmp_path, spelling):
    fields = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, spelling: {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}
    with pytest.raises(ValueError, match="asks for what") as raised:
        Phi3Config.read(write_raw(tmp_path, **fields))
    for fault in ("rope_theta is 10000.0 at the top and 500000.0 in", "partial_rotary_factor is 1.0 at the top and 0.5 in"):
        assert f"{fault} {spelling}: they must agree" in str(raised.value)


def test_rotary_settings_that_disagree_between_the_spellings_are_refused(tmp_path):
    message = "rope_theta is 10000.0 in rope_scaling and 500000.0 in rope_parameters: they must agree"
    with pytest.raises(ValueError, match=re.escape(message)):
        Phi3Config.read(write_raw(tmp_path, rope_scaling={"rope_theta": 1e4}, rope_parameters={"rope_theta": 5e5}))


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", None, ["su"]])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_every_other_kind_of_rotary_embedding_is_refused(tmp_path, spelling, kind, key):
    message = f"{spelling} must be null or of a type among default, longrope, su, yarn, not {kind!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Phi3Config.read(write_raw(tmp_path, **{spelling: {key: kind}}))


FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2, 16.5]}
SMALL = {"hidden_size": 16, "num_attention_heads": 4}  # heads of 4 dimensions, which are 2 pairs
LONGROPE = LongRope((1.0, 1.5), (2, 16.5))


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_every_spelling_of_longrope_is_read(tmp_path, spelling, kind, key):
    rope = {spelling: {key: kind} | FACTORS}
    config = Phi3Config.read(write_raw(tmp_path, **SMALL, **rope, original_max_position_embeddings=64))
    assert config == Phi3Config(**SMALL, longrope=LONGROPE, original_max_position_embeddings=64)


def test_the_present_name_of_the_rotary_type_counts_before_the_early_one(tmp_path):
    rope = {"type": "linear", "rope_type": "longrope"} | FACTORS
    assert Phi3Config.read(write_raw(tmp_path, **SMALL, rope_scaling=rope)).longrope == LONGROPE


def test_longrope_told_twice_must_agree(tmp_path):
    rope = {"rope_type": "longrope"} | FACTORS
    assert Phi3Config.read(write_raw(tmp_path, **SMALL, rope_scaling=rope, rope_parameters=rope)).longrope == LONGROPE
    other = {"rope_type": "default", "short_factor": [1.0, 2.5]}
    with pytest.raises(ValueError, match="asks for what") as raised:
        Phi3Config.read(write_raw(tmp_path, **SMALL, rope_scaling=rope, rope_parameters=other))
    for fault in (
        "short_factor is [1.0, 1.5] in rope_scaling and [1.0, 2.5] in rope_parameters: they must agree",
        "rope_type is 'longrope' in rope_scaling and 'default' in rope_parameters: they must agree",
    ):
        assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("top", "inner", "expected"), [(64, None, 64), (None, 32, 32), (64, 32, 64), (None, None, 4096)], ids=str
)
def test_the_original_length_is_read_at_the_top_first_then_in_the_rotary_settings(tmp_path, top, inner, expected):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": inner} | FACTORS
    config = Phi3Config.read(write_raw(tmp_path, **SMALL, rope_parameters=rope, original_max_position_embeddings=top))
    assert config.original_max_position_embeddings == expected


def test_the_optional_factors_are_read_and_null_is_none(tmp_path):
    rope = {"rope_type": "longrope", "factor": 8, "attention_factor": None} | FACTORS
    config = Phi3Config.read(write_raw(tmp_path, **SMALL, rope_scaling=rope))
    assert config.longrope == LongRope((1.0, 1.5), (2, 16.5), factor=8)


def test_what_is_missing_or_unknown_in_longrope_is_told_at_once(tmp_path):
    rope = {"type": "su", "short_mscale": 1.1, "mscale_all_dim": 1}
    with pytest.raises(ValueError, match="asks for what this decoder does not do") as raised:
        Phi3Config.read(write_raw(tmp_path, rope_scaling=rope))
    assert str(raised.value).partition(" do: ")[2].split("; ") == [
        "rope_scaling.short_mscale is unknown, and may change what the model computes",
        "rope_scaling.mscale_all_dim is unknown, and may change what the model computes",
        "LongRoPE needs short_factor",
        "LongRoPE needs long_factor",
    ]


@pytest.mark.parametrize("value", [[1.0, 0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [1.0, "1"], [True, 1.0], "11", 1.0])
@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_factors_that_are_no_positive_numbers_are_refused(tmp_path, name, value):
    rope = {"type": "longrope"} | FACTORS | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a list of positive numbers, not "):
        Phi3Config.read(write_raw(tmp_path, **SMALL, rope_scaling=rope))


def test_all_faults_of_longrope_are_told_at_once():
    with pytest.raises(ValueError, match=r"^Phi3Config: ") as raised:
        Phi3Config(vocab_size=0, longrope=LongRope((0,), "x", factor=-1, attention_factor=math.inf))
    assert str(raised.value).removeprefix("Phi3Config: ").split("; ") == [
        "vocab_size must be a positive integer, not 0",
        "short_factor must be a list of positive numbers, not (0,)",
        "long_factor must be a list of positive numbers, not 'x'",
        "factor must be a positive number, not -1",
        "attention_factor must be a positive number, not inf",
    ]
    with pytest.raises(ValueError, match=r"^Phi3Config: longrope must be a LongRope, not 7$"):
        Phi3Config(longrope=7)


def test_longrope_that_does_not_fit_the_sizes_is_told_at_once():
    with pytest.raises(ValueError, match=r"^Phi3Config: ") as raised:
        Phi3Config(
            **SMALL, head_dim=16, partial_rotary_factor=0.75, original_max_position_embeddings=1,
            longrope=LongRope([1.0] * 8, [1.0] * 2),
        )  # fmt: skip
    assert str(raised.value).removeprefix("Phi3Config: ").split("; ") == [
        "original_max_position_embeddings must be at least 2 under LongRoPE, not 1",
        "short_factor must hold 6 numbers, one for each pair of dimensions that rotates, not 8",
        "long_factor must hold 6 numbers, one for each pair of dimensions that rotates, not 2",
    ]


def test_longrope_is_no_key_of_a_config_file(tmp_path):
    with pytest.raises(ValueError, match="longrope is unknown, and may change what the model computes"):
        Phi3Config.read(write_raw(tmp_path, **SMALL, longrope=FACTORS))


OTHER_MODELS = {
    "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "lm_head_bias": True, "attention_dropout": 0.1,
    "embd_pdrop": 0.1, "resid_pdrop": 0.1, "full_attn_mod": 2, "interpolate_factor": 2, "pretraining_tp": 2, "is_decoder": "yes",
    "is_encoder_decoder": True, "add_cross_attention": True,
    "layer_types": ["full_attention"],
}  # fmt: skip


def test_every_fixed_field_is_tried():
    assert OTHER_MODELS.keys() == FIXED.keys()


@pytest.mark.parametrize(("name", "value"), OTHER_MODELS.items())
def test_a_field_that_makes_it_another_model_is_refused(tmp_path, name, value):
    message = f"this decoder does not do: {name} must be {' or '.join(map(repr, FIXED[name]))}, not {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Phi3Config.read(write_raw(tmp_path, **{name: value}))


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_field_at_its_value_is_accepted(tmp_path, name):
    for value in FIXED[name]:
        assert Phi3Config.read(write_raw(tmp_path, **{name: value})) == Phi3Config()


def test_all_that_is_unknown_or_refused_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="asks for what this decoder does not do") as raised:
        Phi3Config.read(write_raw(tmp_path, mup_width=2, hidden_act="gelu", rope_scaling={"type": "su"}, attn_bias_scale=1))
    for fault in (
        "mup_width is unknown, and may change what the model computes",
        "attn_bias_scale is unknown",
        "hidden_act must be 'silu', not 'gelu'",
        "LongRoPE needs short_factor",
    ):
        assert fault in str(raised.value)


def test_notes_and_fields_without_effect_are_let_through(tmp_path):
    notes = {"_name_or_path": "x", "_source": "y", "use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "9"}
    assert Phi3Config.read(write_raw(tmp_path, **notes)) == Phi3Config()


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("phi3small", "Phi-3-small is another architecture (block-sparse attention)"),
        ("llama", "this is a Phi-3 decoder"),
        (None, "this is a Phi-3 decoder"),
    ],
)
def test_another_architecture_is_refused(tmp_path, model_type, why):
    with pytest.raises(ValueError, match=re.escape(f'model_type must be "phi3", not {model_type!r}: {why}')):
        Phi3Config.read(write_raw(tmp_path, model_type=model_type))


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "must be JSON"), (b"\xff", "must be JSON"), (b"[1]", "must hold a JSON object, not a list")]
)
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        Phi3Config.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "config.json"))):
        Phi3Config.read(tmp_path / "config.json")


def test_all_contradictions_are_told_at_once():
    with pytest.raises(ValueError, match=r"^Phi3Config: ") as raised:
        Phi3Config(
            hidden_size=33, num_attention_heads=4, num_key_value_heads=3, partial_rotary_factor=1.5,
            vocab_size=10, bos_token_id=-1, eos_token_id=[3, 10], pad_token_id=None,
        )  # fmt: skip
    assert str(raised.value).removeprefix("Phi3Config: ").split("; ") == [
        "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
        "hidden_size (33) must be a multiple of num_attention_heads (4), or head_dim be given",
        "partial_rotary_factor (1.5) must leave an even share of head_dim to rotate",
        "bos_token_id -1 must lie within the vocabulary of 10",
        "eos_token_id 10 must lie within the vocabulary of 10",
    ]


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "original_max_position_embeddings", "sliding_window",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *((name, value, "a positive integer") for name in SIZES for value in (0, -1, 2.0, "8", True)),
        *((name, value, "a positive number") for name in NUMBERS for value in (0.0, -1, "1", None, math.nan, math.inf, True)),
        *((name, value, "a token id") for name in IDS for value in ("</s>", 1.5, True, ["</s>"], {})),
        *((name, [1], "a token id") for name in ("bos_token_id", "pad_token_id")),
        *(("tie_word_embeddings", value, "true or false") for value in ("false", 0, None)),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_the_name_of_its_field(tmp_path, name, value, kind):
    path = write_raw(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=re.escape(f"{path}: Phi3Config: {name} must be {kind}, not {value!r}")):
        Phi3Config.read(path)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", ["default"], 2.0])
def test_rotary_settings_that_are_no_object_are_refused(tmp_path, spelling, value):
    with pytest.raises(ValueError, match=re.escape(f"{spelling} must be an object or null, not {value!r}")):
        Phi3Config.read(write_raw(tmp_path, **{spelling: value}))


def test_all_values_of_the_wrong_kind_are_told_at_once():
    with pytest.raises(ValueError, match=r"^Phi3Config: ") as raised:
        Phi3Config(**dict.fromkeys((*SIZES, *NUMBERS, *IDS), "x"))
    assert all(f"{name} must be a" in str(raised.value) for name in (*SIZES, *NUMBERS, *IDS))


@pytest.mark.parametrize("factor", [1.5, 0.01, 0.3])
def test_the_rotating_share_of_a_head_must_be_even_and_not_nothing(factor):
    message = f"partial_rotary_factor ({factor}) must leave an even share of head_dim to rotate"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(head_dim=10, partial_rotary_factor=factor)


@st.composite
def configs(draw):
    kv, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    half = draw(st.integers(1, 16))
    vocabulary = draw(st.integers(2, 50000))
    ids = st.none() | st.integers(0, vocabulary - 1)
    longrope = draw(st.none() | longropes(half))
    return Phi3Config(
        vocab_size=vocabulary,
        hidden_size=kv * groups * 2 * half,
        intermediate_size=draw(st.integers(1, 99)),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=kv * groups,
        num_key_value_heads=draw(st.sampled_from([kv, None])),
        # transformers counts the factors by hidden_size, and so refuses LongRoPE beside another head_dim
        head_dim=draw(st.sampled_from([None, 8, 20])) if longrope is None else None,
        max_position_embeddings=draw(st.integers(1, 99999)),
        original_max_position_embeddings=draw(st.integers(2, 99999)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([10000.0, 250000.0, 7.5])),
        longrope=longrope,
        sliding_window=draw(st.none() | st.integers(1, 9999)),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(ids),
        eos_token_id=draw(ids | st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=3)),
        pad_token_id=draw(ids),
    )


def longropes(pairs: int):
    factor = st.floats(1e-3, 1e3)
    factors = st.lists(factor, min_size=pairs, max_size=pairs)
    return st.builds(LongRope, factors, factors, factor=st.none() | factor, attention_factor=st.none() | factor)


@given(config=configs(), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_write_then_read_is_the_identity_and_transformers_reads_the_same(tmp_path_factory, config, dtype):
    folder = tmp_path_factory.mktemp("config")
    config.write(folder / "config.json", dtype)
    assert Phi3Config.read(folder / "config.json") == config
    theirs = transformers.Phi3Config.from_pretrained(folder)
    fields, rope = as_transformers_has_it(config)
    assert {name: theirs.rope_parameters[name] for name in theirs.rope_parameters if name != "type"} == rope
    assert {name: getattr(theirs, name) for name in fields} == fields
    assert str(theirs.dtype) == f"torch.{dtype}"


def test_an_absent_original_length_is_written_as_the_length_itself(tmp_path):
    tiny_config(max_position_embeddings=77).write(tmp_path / "config.json", "float32")
    assert json.loads((tmp_path / "config.json").read_text())["original_max_position_embeddings"] == 77


def test_partial_rotation_survives_writing_and_transformers(tmp_path):
    config = tiny_config(head_dim=8, partial_rotary_factor=0.5, original_max_position_embeddings=1024)
    config.write(tmp_path / "config.json", "float32")
    assert Phi3Config.read(tmp_path / "config.json") == config
    theirs = transformers.Phi3Config.from_pretrained(tmp_path)
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    assert Phi3Config.read(tmp_path / "theirs" / "config.json") == config


@given(configs())
def test_what_transformers_writes_is_read(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    fields, rope = as_transformers_has_it(config)
    transformers.Phi3Config(**fields, rope_parameters=rope).save_pretrained(folder)
    assert Phi3Config.read(folder / "config.json") == config
