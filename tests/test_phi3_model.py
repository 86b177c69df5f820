"""The decoder against transformers' Phi-3 on random tiny models, and against glassllm on really trained weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import as_transformers_has_it, largest_difference, load_in_transformers, rms_error, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from minilora import phi3
from minilora.kernels import arithmetic
from minilora.phi3.cache import KVCache
from minilora.phi3.config import LongRope
from minilora.phi3.generation import generate_ids
from minilora.phi3.model import RMSNorm

CONFIGS = {
    "grouped-query": tiny_config(),
    "multi-head": tiny_config(num_key_value_heads=None),
    "multi-query": tiny_config(num_key_value_heads=1),
    "tied": tiny_config(tie_word_embeddings=True),
    "window": tiny_config(sliding_window=5),
    "partial-rotary": tiny_config(partial_rotary_factor=0.75, head_dim=8),
    "head-dim": tiny_config(head_dim=12, rope_theta=500.0, rms_norm_eps=1e-3),
    "all-at-once": tiny_config(head_dim=16, partial_rotary_factor=0.5, sliding_window=3, tie_word_embeddings=True),
}
LONGROPE = tiny_config(
    longrope=LongRope([1.0, 1.2, 1.4, 1.6], [2.0, 4.0, 8.0, 16.0]), max_position_embeddings=1024,
    original_max_position_embeddings=12, sliding_window=9,
)  # fmt: skip
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
B, T = 3, 17
LEFT = (torch.arange(T) >= torch.tensor([0, 5, 14])[:, None]).long()  # (B, T): 17, 12 and 3 tokens, padded on the left
RIGHT = LEFT.flip(1)
EVERY = torch.ones_like(LEFT)
paddings = pytest.mark.parametrize("is_token", [EVERY, LEFT, RIGHT], ids=["unpadded", "left-padded", "right-padded"])


def random_ids(B=B, T=T, seed=0):
    return torch.randint(0, 260, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Our model and transformers', loaded from what phi3.save wrote."""
    ours, folder = tiny_model(CONFIGS[request.param]), tmp_path_factory.mktemp("ours") / request.param
    phi3.save(ours, folder)
    return ours, load_in_transformers(folder)


@paddings
def test_logits_equal_those_of_transformers(pair, is_token):
    ours, theirs = pair
    ids = random_ids()
    with torch.no_grad():
        logits = ours(ids, attention_mask=None if is_token is EVERY else is_token)
        expected = theirs(ids, attention_mask=is_token).logits
    assert logits.shape == (B, T, 260)
    assert largest_difference(logits[is_token.bool()], expected[is_token.bool()]) < 5e-6


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_as_many_of_the_last_logits_are_kept_as_by_transformers(pair, kept):
    ours, theirs = pair
    with torch.no_grad():
        logits = ours(random_ids(), logits_to_keep=kept)
        expected = theirs(random_ids(), logits_to_keep=kept).logits
    assert logits.shape == expected.shape == (B, kept or T, 260)
    assert largest_difference(logits, expected) < 5e-6


@every_config
def test_what_transformers_saves_is_loaded_and_gives_its_logits(config, tmp_path):
    fields, rope = as_transformers_has_it(dataclasses.replace(config, original_max_position_embeddings=1024))
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields, rope_parameters=rope, initializer_range=0.1)).eval()
    theirs.save_pretrained(tmp_path)
    ours = phi3.load(tmp_path)
    ids = random_ids()
    with torch.no_grad():
        assert largest_difference(ours(ids), theirs(ids).logits) < 5e-6


@paddings
def test_loss_and_gradients_equal_those_of_transformers(pair, is_token):
    ours, theirs = pair
    ids = random_ids(seed=1)
    follows_a_token = torch.nn.functional.pad(is_token[:, :-1], (1, 0))  # what a padded query foretells nobody reads
    labels = torch.where((is_token * follows_a_token == 1) & (random_ids(seed=2) > 60), ids, -100)
    loss = ours(ids, labels, is_token)
    expected = theirs(ids, labels=labels, attention_mask=is_token).loss
    assert loss.dtype == torch.float32
    assert rms_error(loss, expected) < 1e-6
    loss.backward()
    expected.backward()
    theirs_by_name = dict(theirs.named_parameters())
    try:
        for name, parameter in ours.named_parameters():
            assert rms_error(parameter.grad, theirs_by_name[name].grad) < 1e-5, name
    finally:
        ours.zero_grad()
        theirs.zero_grad()


@every_config
def test_bfloat16_is_as_near_to_float64_as_that_of_transformers(config, tmp_path):
    phi3.save(tiny_model(config), tmp_path / "model")
    exact, ours = (phi3.load(tmp_path / "model", dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    theirs = load_in_transformers(tmp_path / "model", torch.bfloat16)
    exact.load_state_dict(ours.state_dict())  # the same rounded weights
    ids = random_ids(B=16)
    with torch.no_grad():
        expected, actual = exact(ids), ours(ids)
        assert actual.dtype == torch.bfloat16
        assert expected.dtype == torch.float64
        assert rms_error(actual, expected) < 1.1 * rms_error(theirs(ids).logits, expected) < 0.05


@every_config
def test_float64_refines_float32(config):
    model, ids = tiny_model(config), random_ids()
    with torch.no_grad():
        logits = model(ids)
        assert rms_error(logits, model.double()(ids)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_rounded_before_its_weight_bit_for_bit_as_in_transformers(dtype):
    ours, theirs = RMSNorm(64, 1e-5), Phi3RMSNorm(64, 1e-5)
    weight, x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours.weight.data = theirs.weight.data = weight[0]
    assert torch.equal(ours(x)[1], theirs(x))


@pytest.mark.parametrize("tie", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(tie):
    model, ids = tiny_model(tiny_config(tie_word_embeddings=tie, num_hidden_layers=4)).train(), random_ids()
    gradients, kept = [], []
    for checkpointing in (False, True):
        model.model.gradient_checkpointing = checkpointing
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, b=bytes_kept: b.append(t.nbytes) or t, lambda t: t):
            loss = model(ids, ids)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(sum(bytes_kept))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 3


@every_config
@pytest.mark.parametrize("is_token", [EVERY, LEFT], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("steps", [[1] * T, [12, 1, 1, 1, 1, 1], [4, 6, 7], [T]], ids=str)
def test_a_cached_run_in_any_steps_equals_one_pass(config, is_token, steps):
    model, ids = tiny_model(config), random_ids()
    cache = KVCache(config, B, T, torch.float32, ids.device)
    with torch.no_grad():
        expected = model(ids, attention_mask=is_token)
        pieces = zip(ids.split(steps, dim=1), is_token.split(steps, dim=1), strict=True)
        logits = torch.cat([model(piece, attention_mask=mask, cache=cache) for piece, mask in pieces], dim=1)
    assert largest_difference(logits[is_token.bool()], expected[is_token.bool()]) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_mask_is_made_once_for_all_layers_in_the_dtype_that_attention_takes(monkeypatch, dtype, multiplies):
    monkeypatch.setattr(arithmetic, "multiplies", lambda dtype: multiplies or dtype == torch.float32)
    taken, sdpa = [], F.scaled_dot_product_attention

    def attention(q, k, v, mask, **settings):
        taken.append((q.dtype, mask))
        boolean = sdpa(q, k, v, mask == 0, **settings)
        assert torch.equal(sdpa(q, k, v, mask, **settings), boolean)
        return boolean

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model = tiny_model(tiny_config(num_hidden_layers=3, sliding_window=5)).to(dtype)
    with torch.no_grad():
        model(random_ids(), attention_mask=LEFT)
    expected = dtype if multiplies else torch.float32
    assert [q for q, _ in taken] == [mask.dtype for _, mask in taken] == [expected] * 3
    assert len({mask.data_ptr() for _, mask in taken}) == 1
    assert not any(mask.isnan().any() for _, mask in taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_in_16_bits_are_near_those_in_float32_without_16_bit_arithmetic(monkeypatch, dtype):
    monkeypatch.setattr(arithmetic, "multiplies", lambda of: of == torch.float32)
    ids, found = random_ids(), []
    for as_ in (dtype, torch.float32):
        model = tiny_model(tiny_config()).to(dtype).to(as_)
        loss = model(ids, labels=ids, attention_mask=LEFT)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for half, whole in zip(*found, strict=True):
        assert rms_error(half, whole) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_without_a_mask_every_cached_token_counts():
    model, ids = tiny_model(tiny_config()), random_ids()
    cache = KVCache(model.config, B, T, torch.float32, ids.device)
    with torch.no_grad():
        logits = torch.cat([model(ids[:, :9], cache=cache), model(ids[:, 9:], cache=cache)], dim=1)
        assert largest_difference(logits, model(ids)) < 5e-6


def test_a_cache_without_room_is_refused():
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError, match="the cache holds 4 tokens a sequence, and 5 were given"):
        model(random_ids(B=1, T=5), cache=KVCache(model.config, 1, 4, torch.float32, torch.device("cpu")))


@every_config
def test_a_token_never_sees_a_later_one_nor_one_outside_its_window(config):
    model, ids = tiny_model(config), random_ids(B=1)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 256
    with torch.no_grad():
        differs = (model(ids) != model(changed)).any(-1)[0]
    reach = T if config.sliding_window is None else 1 + config.num_hidden_layers * (config.sliding_window - 1)
    assert not differs[:8].any()
    assert differs[8 : 8 + reach].all()
    assert not differs[8 + reach :].any()


def test_padding_changes_nothing_whatever_its_tokens_and_its_length():
    model, ids = tiny_model(tiny_config()).double(), random_ids()
    other = torch.where(LEFT.bool(), ids, random_ids(seed=9))
    with torch.no_grad():
        logits, again = model(ids, attention_mask=LEFT), model(other, attention_mask=LEFT)
        alone = model(ids[1:2, 5:])
    assert torch.equal(logits[LEFT.bool()], again[LEFT.bool()])
    # Positions count tokens only: others would differ by their float32 angles, some 1e-8.
    assert largest_difference(logits[1:2, 5:], alone) < 1e-13
    assert logits.isfinite().all()


DOCUMENTS = {"two": [9, 8], "short, long, short": [3, 13, 1], "of every length to the end": [1, 2, 3, 4, 7], "one": [17]}


def packed(lengths, T=T):
    """The numbers of documents of these lengths side by side, (1, T), and padding."""
    numbers = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return torch.tensor([numbers + [0] * (T - len(numbers))])


@pytest.mark.parametrize("config", [*CONFIGS.values(), LONGROPE], ids=[*CONFIGS, "longrope"])
@pytest.mark.parametrize("lengths", [*DOCUMENTS.values(), [5, 6]], ids=[*DOCUMENTS, "padded"])
def test_packed_documents_are_to_one_another_as_if_alone(config, lengths):
    model, ids = tiny_model(config).double(), random_ids(B=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=packed(lengths))
        alone = [model(document) for document in ids[:, : sum(lengths)].split(lengths, dim=1)]
    assert largest_difference(logits[:, : sum(lengths)], torch.cat(alone, dim=1)) < 1e-13


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_rows_packed_each_in_its_own_way_are_as_if_alone(one, other, data):
    model, width = tiny_model(dataclasses.replace(LONGROPE, original_max_position_embeddings=5)).double(), 36
    ids, numbers = random_ids(B=2, T=width), torch.cat([packed(one, width), packed(other, width)])
    shift = data.draw(st.integers(0, width - sum(other)))  # padding on both sides
    numbers[1] = numbers[1].roll(shift)
    with torch.no_grad():
        logits = model(ids, attention_mask=numbers)
        for b, lengths in enumerate([one, other]):
            for number in range(1, len(lengths) + 1):
                its = numbers[b] == number
                assert largest_difference(logits[b, its], model(ids[b : b + 1, its])[0]) < 1e-13


def test_a_packed_row_of_the_loss_is_the_mean_over_its_documents_alone():
    model, ids, lengths = tiny_model(LONGROPE), random_ids(B=1), [3, 13, 1]
    loss = model(ids, ids, packed(lengths))
    alone = [model(document, document) * (document.shape[1] - 1) for document in ids.split(lengths, dim=1)[:2]]
    assert rms_error(loss, sum(alone) / (2 + 12)) < 1e-6


def test_a_packed_row_may_be_read_in_steps_through_a_cache():
    model, ids, numbers = tiny_model(CONFIGS["window"]), random_ids(B=1), packed([6, 8, 3])
    cache = KVCache(model.config, 1, T, torch.float32, ids.device)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], attention_mask=numbers[:, t : t + 1], cache=cache) for t in range(T)]
        assert largest_difference(torch.cat(steps, dim=1), model(ids, attention_mask=numbers)) < 5e-6


@pytest.mark.parametrize("is_token", [LEFT, RIGHT], ids=["left-padded", "right-padded"])
def test_each_row_of_a_batch_takes_the_longrope_factors_for_its_own_length(is_token):
    model, ids = tiny_model(LONGROPE).double(), random_ids()  # rows of 17, 12 and 3 tokens; 12 is the longest of the short
    with torch.no_grad():
        logits = model(ids, attention_mask=is_token)
        for b in range(B):
            its = is_token[b].bool()
            assert largest_difference(logits[b, its], model(ids[b : b + 1, its])[0]) < 1e-13


@pytest.mark.parametrize("length", [1, 11, 12, 13, 17])
def test_longrope_gives_the_logits_of_transformers_on_both_sides_of_its_original_length(length, tmp_path):
    ours = tiny_model(LONGROPE)
    phi3.save(ours, tmp_path / "model")
    ids, theirs = random_ids(T=length), load_in_transformers(tmp_path / "model")
    with torch.no_grad():
        assert largest_difference(ours(ids), theirs(ids).logits) < 5e-6


@pytest.mark.parametrize("is_token", [None, LEFT], ids=["unpadded", "left-padded"])
def test_a_cache_that_longrope_outgrows_is_refused_until_it_is_cleared(is_token):
    model, ids = tiny_model(LONGROPE), random_ids()
    masks = [None] * 3 if is_token is None else [is_token[:, :12], is_token[:, 12:13], is_token[:, :13]]
    cache = KVCache(model.config, B, T, torch.float32, ids.device)
    with torch.no_grad():
        model(ids[:, :12], attention_mask=masks[0], cache=cache)
        with pytest.raises(ValueError, match=r"a sequence in the cache grows past 12 tokens .* clear the cache, and give all"):
            model(ids[:, 12:13], attention_mask=masks[1], cache=cache)
        cache.clear()
        logits = model(ids[:, :13], attention_mask=masks[2], cache=cache)
        logits = torch.cat([logits, model(ids[:, 13:], cache=cache)], dim=1)
        expected = model(ids, attention_mask=is_token)
    assert largest_difference(logits[0], expected[0]) < 5e-6


def test_tied_weights_are_one_parameter_after_building_loading_and_casting(tmp_path):
    model = tiny_model(CONFIGS["tied"])
    phi3.save(model, tmp_path / "tied")
    loaded = [phi3.load(tmp_path / "tied", dtype=dtype) for dtype in (None, torch.bfloat16)]
    for tied in (model, *loaded, tiny_model(CONFIGS["tied"]).to(torch.float64)):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(tied.named_parameters())


def test_untied_weights_are_two_parameters():
    model = tiny_model(CONFIGS["grouped-query"])
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_stacked_projections_name_their_rows_in_order():
    layer = tiny_model(CONFIGS["head-dim"]).model.layers[0]
    assert list(layer.self_attn.qkv_proj.packed.items()) == [("q_proj", 48), ("k_proj", 24), ("v_proj", 24)]
    assert list(layer.mlp.gate_up_proj.packed.items()) == [("gate_proj", 48), ("up_proj", 48)]
    assert layer.self_attn.qkv_proj.weight.shape == (96, 32)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 3_821_079_552),  # Phi-3-mini
        (
            {"vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
            3_836_021_760,  # Phi-4-mini
        ),
    ],
)
def test_published_sizes_give_the_published_numbers_of_parameters(fields, expected):
    with torch.device("meta"):
        model = phi3.Phi3ForCausalLM(phi3.Phi3Config(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def frozen_but_for_projections(config):
    """As under LoRA: the norms are frozen, so that their own operation runs, and not its reference."""
    model = tiny_model(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_proj.weight"))
    return model


@every_config
def test_gradients_of_projections_between_frozen_norms_are_those_of_a_model_trained_whole(config):
    whole, frozen, ids = tiny_model(config), frozen_but_for_projections(config), random_ids()
    whole(ids, ids).backward()
    frozen(ids, ids).backward()
    expected = dict(whole.named_parameters())
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is not None) == name.endswith("_proj.weight")
        assert parameter.grad is None or rms_error(parameter.grad, expected[name].grad) < 1e-6, name


@pytest.mark.parametrize(("dynamic", "checkpointing"), [(False, True), (True, False)], ids=["checkpointed", "dynamic"])
def test_a_training_step_compiles_without_a_break(dynamic, checkpointing):
    model, ids = frozen_but_for_projections(CONFIGS["partial-rotary"]), random_ids()
    model.model.gradient_checkpointing = checkpointing
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]

    labels = torch.where(random_ids(seed=3) > 100, ids, -100)
    loss = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")(ids, labels=labels)
    found, expected = torch.autograd.grad(loss, wanted), torch.autograd.grad(model(ids, labels=labels), wanted)
    assert all(rms_error(one, other) < 2e-6 for one, other in zip(found, expected, strict=True))


def test_the_loss_is_that_of_the_full_logits():
    model, ids = tiny_model(tiny_config()), random_ids()
    labels = torch.where(random_ids(seed=3) > 100, ids, -100)
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert rms_error(model(ids, labels), expected) < 1e-6


def test_labels_without_a_target_are_an_error():
    ids = random_ids()
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 5  # nothing foretells the first token
    with pytest.raises(ValueError, match="a loss needs at least one target token"):
        tiny_model(tiny_config())(ids, labels)


def glassllm_in_phi3_layout(glass) -> phi3.Phi3ForCausalLM:
    """glassllm's weights; its queries and keys pair neighbours (0, 1), (2, 3), …, Phi-3's pair the halves (0, D/2), …"""
    sizes = glass.cfg
    head_dim = sizes.d_model // sizes.n_heads
    config = phi3.Phi3Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.d_model, intermediate_size=int(8 * sizes.d_model / 3),
        num_hidden_layers=sizes.n_layers, num_attention_heads=sizes.n_heads, num_key_value_heads=sizes.n_kv_heads,
        max_position_embeddings=sizes.max_len, rms_norm_eps=sizes.eps, rope_theta=sizes.rope_base, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = {name: torch.from_numpy(p.data) for name, p in glass.named_parameters().items()}

    def halves(rows):  # (heads · D, C), neighbours paired
        return rows.view(-1, head_dim // 2, 2, sizes.d_model).transpose(1, 2).reshape(-1, sizes.d_model)

    state = {"model.embed_tokens.weight": theirs["E"], "lm_head.weight": theirs["E"], "model.norm.weight": theirs["norm_f.gamma"]}
    for i in range(sizes.n_layers):
        block = {name.removeprefix(f"blocks.{i}."): p for name, p in theirs.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (block[f"attn.W_{letter}"].T for letter in "QKV")
        state |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block["norm1.gamma"],
                "post_attention_layernorm": block["norm2.gamma"],
                "self_attn.qkv_proj": torch.cat([halves(q), halves(k), v]),
                "self_attn.o_proj": block["attn.W_O"].T,
                "mlp.gate_up_proj": torch.cat([block["ffn.W1"].T, block["ffn.W3"].T]),
                "mlp.down_proj": block["ffn.W2"].T,
            }.items()
        }
    model = phi3.Phi3ForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("language", ["en", "pt"])
def test_trained_weights_of_glassllm_give_its_own_numpy_logits(language):
    glassllm = pytest.importorskip("glassllm", reason="glassllm, a trained tiny model on PyPI, is not installed")
    glass, tokenizer = glassllm.load_pretrained(language)
    ids = tokenizer.encode({"en": "Once upon a time there was a little girl", "pt": "Era uma vez uma menina pequena"}[language])
    ids = torch.tensor([(ids * 128)[: glass.cfg.max_len]])  # as long as it can read
    with torch.no_grad():
        logits = glassllm_in_phi3_layout(glass)(ids)
    expected = torch.from_numpy(glass.forward(ids.numpy()).data)
    assert (logits - expected).abs().max() < 1e-4
    assert largest_difference(logits, expected) < 1e-5


def test_trained_weights_of_glassllm_write_its_own_story():
    glassllm = pytest.importorskip("glassllm", reason="glassllm, a trained tiny model on PyPI, is not installed")
    glass, tokenizer = glassllm.load_pretrained("en")
    prompt = tokenizer.encode("Once upon a time")
    steps = generate_ids(glassllm_in_phi3_layout(glass), [prompt], frozenset(), phi3.Sampling(max_new_tokens=60))
    assert [id_ for (id_,) in steps] == [step.token for step in glass.generate(prompt, 60, greedy=True)]
