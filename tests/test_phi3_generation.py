"""Generation: greedy as transformers', batches as single prompts, sampling as its definition, streams as whole answers."""

import re

import pytest
import torch
from helpers import SPECIAL, VOCABULARY, load_in_transformers, tiny_config, tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation import RepetitionPenaltyLogitsProcessor

from minilora import phi3
from minilora.phi3.config import LongRope
from minilora.phi3.generation import generate_ids, penalise, pick

END = SPECIAL["<|im_end|>"]
QUESTION = [{"role": "user", "content": "Why?"}]
PROMPTS = [[5], [7, 1, 200, 31, 8], [9, 4, 77, 2, 2, 250, 16, 33, 90, 11, 12, 13]]
CONFIGS = {
    "grouped-query": tiny_config(),
    "window": tiny_config(sliding_window=4),
    "longrope": tiny_config(longrope=LongRope([1.0, 1.2, 1.4, 1.6], [2.0, 4.0, 8.0, 16.0]), original_max_position_embeddings=16),
    "tied-partial": tiny_config(tie_word_embeddings=True, head_dim=16, partial_rotary_factor=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def answers(model, prompts, stop_ids=frozenset(), **settings):
    """The ids of each answer, checked to be followed by nothing once it has stopped."""
    steps = list(generate_ids(model, prompts, frozenset(stop_ids), phi3.Sampling(**settings)))
    columns = [list(column) for column in zip(*steps, strict=True)]
    ids = [[id_ for id_ in column if id_ is not None] for column in columns]
    assert columns == [row + [None] * (len(steps) - len(row)) for row in ids]
    return ids


@pytest.fixture
def chat(tiny_checkpoint):
    return phi3.load(tiny_checkpoint), phi3.load_tokenizer(tiny_checkpoint)


def reciting_model(tokenizer: phi3.Tokenizer, text: str) -> phi3.Phi3ForCausalLM:
    """A decoder that follows each byte of text by the next one and the last by the end, whatever came before."""
    ids = tokenizer.encode("\n" + text)  # an answer begins after a line break
    assert len(set(ids)) == len(ids), "a byte that comes twice would have two successors"
    model = tiny_model(tiny_config(hidden_size=VOCABULARY, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # attention and MLP add nothing
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight[[*ids[1:], END], ids] = 1
    return model


@every_config
def test_greedy_answers_are_those_of_transformers(config, tmp_path):
    phi3.save(tiny_model(config), tmp_path / "model")
    theirs, ours = load_in_transformers(tmp_path / "model"), phi3.load(tmp_path / "model")
    prompts = torch.randint(0, 256, (4, 6), generator=torch.Generator().manual_seed(0))
    free = answers(ours, prompts.tolist(), max_new_tokens=24)
    stops = {free[0][3], free[1][10]}
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=24, eos_token_id=sorted(stops),
        pad_token_id=256,
    )[:, 6:].tolist()  # fmt: skip
    actual = answers(ours, prompts.tolist(), stops, max_new_tokens=24)
    assert len(actual[0]) <= 4 < 24
    for mine, theirs_ in zip(actual, expected, strict=True):
        assert mine == theirs_[: len(mine)]
        assert set(theirs_[len(mine) :]) <= {256}  # padding once it has stopped


@pytest.mark.parametrize("config", [CONFIGS[name] for name in ("grouped-query", "window", "tied-partial")])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_answers_to_a_left_padded_batch_are_those_of_transformers(config, penalty, tmp_path):
    """transformers takes padding for seen: the pad id stands in every prompt here, where that makes no difference.

    Under LongRoPE it turns a short row beside a long one by the long one's table, which the row alone would not be.
    """
    phi3.save(tiny_model(config, seed=1), tmp_path / "model")
    theirs, ours = load_in_transformers(tmp_path / "model"), phi3.load(tmp_path / "model")
    pad = 3
    prompts = [[pad, *prompt] for prompt in PROMPTS]
    length = max(map(len, prompts))
    padded = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    free = answers(ours, prompts, max_new_tokens=24, repetition_penalty=penalty)
    stops = {free[0][3], free[1][10], free[2][-1]}
    expected = theirs.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=24, repetition_penalty=penalty,
        eos_token_id=sorted(stops), pad_token_id=pad,
    )[:, length:].tolist()  # fmt: skip
    actual = answers(ours, prompts, stops, max_new_tokens=24, repetition_penalty=penalty)
    assert len(actual[0]) <= 4 < 24
    for mine, row in zip(actual, expected, strict=True):
        assert mine == row[: len(mine)]
        assert set(row[len(mine) :]) <= {pad}


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    penalty=st.sampled_from([0.5, 1.0, 1.1, 3.0]),
)
def test_the_repetition_penalty_is_that_of_transformers(logits, ids, penalty):
    logits, ids = torch.tensor([logits]), torch.tensor([ids])
    seen = torch.zeros(1, 6, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(penalise(logits, seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))


def test_padding_is_not_seen_by_the_repetition_penalty():
    model = tiny_model(tiny_config())
    (first, *_), *_ = answers(model, PROMPTS)
    with torch.no_grad():  # id 0, which pads the shorter prompts, becomes the likeliest answer to the shortest
        model.lm_head.weight[[0, first]] = model.lm_head.weight[[first, 0]]
    settings = {"max_new_tokens": 12, "repetition_penalty": 4.0}
    alone = [answers(model, [prompt], **settings)[0] for prompt in PROMPTS]
    assert alone[0][0] == 0
    assert answers(model, PROMPTS, **settings) == alone


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_gives_each_prompt_the_answer_it_gets_alone(config, dtype):
    model = tiny_model(config, seed=2).to(dtype)
    alone = [answers(model, [prompt], max_new_tokens=16)[0] for prompt in PROMPTS]
    assert answers(model, PROMPTS, max_new_tokens=16) == alone


def test_each_prompt_stops_on_its_own_and_its_stop_id_is_its_last():
    model = tiny_model(tiny_config(), seed=3)
    free = answers(model, PROMPTS, max_new_tokens=20)
    for stops in ({free[0][2]}, {free[1][0], free[2][9]}, set(range(VOCABULARY))):
        expected = [row[: next((i + 1 for i, id_ in enumerate(row) if id_ in stops), 20)] for row in free]
        assert answers(model, PROMPTS, stops, max_new_tokens=20) == expected


def test_answers_are_no_longer_than_asked_for():
    model = tiny_model(tiny_config())
    assert [len(row) for row in answers(model, PROMPTS, max_new_tokens=7)] == [7, 7, 7]


def test_gradients_stay_on_for_whoever_takes_the_tokens_one_by_one():
    steps = generate_ids(tiny_model(tiny_config()), PROMPTS, frozenset(), phi3.Sampling(max_new_tokens=3))
    assert [torch.is_grad_enabled() for _ in steps] == [True] * 3


def test_the_same_seed_gives_the_same_answers_and_others_differ():
    model = tiny_model(tiny_config())
    drawn = [answers(model, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3] != drawn[0]
    torch.manual_seed(99)  # torch's own generator has no say
    assert answers(model, PROMPTS, max_new_tokens=12, temperature=1.0, seed=0) == drawn[0]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}, {"temperature": 1e-30}])
def test_the_narrowest_sampling_is_greedy(settings):
    model = tiny_model(tiny_config())
    greedy = answers(model, PROMPTS, max_new_tokens=12)
    assert answers(model, PROMPTS, max_new_tokens=12, **{"temperature": 1.0} | settings) == greedy


def drawn_counts(logits: list[float], n=20_000, **settings) -> torch.Tensor:
    rows = torch.tensor(logits).expand(n, -1)
    ids = pick(rows, phi3.Sampling(**{"temperature": 1.0} | settings), torch.Generator().manual_seed(0))
    assert ids.shape == (n,)
    return torch.bincount(ids, minlength=len(logits))


def definition(logits, temperature, top_k, top_p) -> list[float]:
    """The distribution to draw from, by the definitions of temperature, top-k and nucleus sampling, in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weights = {i: torch.tensor((logits[i] - max(logits)) / temperature, dtype=torch.float64).exp().item() for i in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        assume(top_p is None or abs(reached - top_p) > 1e-4)  # rounding decides there
        if top_p is not None and reached >= top_p:
            break
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@given(
    logits=st.lists(st.integers(-30, 30), min_size=1, max_size=8, unique=True).map(lambda tenths: [t / 10 for t in tenths]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_samples_follow_the_definition(logits, temperature, top_k, top_p):
    assume(top_p is None or top_p < 0.9999 or top_p == 1)
    expected = torch.tensor(definition(logits, temperature, top_k, top_p if top_p != 1 else None), dtype=torch.float64)
    n = 20_000
    counts = drawn_counts(logits, n, temperature=temperature, top_k=top_k, top_p=top_p)
    assert not counts[expected == 0].any()
    deviation = (counts - n * expected).abs()
    assert (deviation <= 5.5 * (n * expected * (1 - expected)).sqrt() + 1).all()


def test_a_high_temperature_draws_uniformly_and_zero_takes_the_likeliest():
    counts = drawn_counts([0.0, 1.0, 2.0, 9.0], temperature=1e6)
    assert (counts - 5000).abs().max() < 400
    assert drawn_counts([0.0, 1.0, 2.0, 9.0], temperature=0.0).tolist() == [0, 0, 0, 20_000]


def test_each_row_is_drawn_from_its_own_logits():
    logits = torch.full((3, 5), -torch.inf)
    logits[[0, 1, 2], [4, 0, 3]] = 0.0
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        sampling = phi3.Sampling(**{"temperature": 1.0} | settings)
        assert pick(logits.bfloat16(), sampling, torch.Generator()).tolist() == [4, 0, 3]


def test_generate_answers_the_conversation_without_its_end(chat):
    model, tokenizer = chat
    (ids,) = answers(model, [tokenizer.encode_prompt(QUESTION)], tokenizer.stop_ids, max_new_tokens=9)
    assert ids[-1] == END
    assert phi3.generate(model, tokenizer, QUESTION, max_new_tokens=9) == tokenizer.decode(ids[:-1])
    other = [{"role": "user", "content": "And a longer question?"}]
    both = phi3.generate_batch(model, tokenizer, [QUESTION, other], max_new_tokens=9)
    assert both == [phi3.generate(model, tokenizer, messages, max_new_tokens=9) for messages in (QUESTION, other)]


TEXT = "aé→😀b"


def test_a_recited_text_ends_at_its_end_token(tiny_tokenizer):
    tokenizer = phi3.load_tokenizer(tiny_tokenizer)
    model = reciting_model(tokenizer, TEXT)
    assert phi3.generate(model, tokenizer, QUESTION) == TEXT
    assert phi3.generate(model, tokenizer, QUESTION, max_new_tokens=3) == "aé"


def test_a_character_of_several_tokens_is_streamed_whole(tiny_tokenizer):
    tokenizer = phi3.load_tokenizer(tiny_tokenizer)
    model = reciting_model(tokenizer, TEXT)
    assert list(phi3.stream(model, tokenizer, QUESTION)) == list(TEXT)


@pytest.mark.parametrize("length", range(1, len(TEXT.encode()) + 2))
def test_streamed_pieces_join_to_the_answer_wherever_it_is_cut(tiny_tokenizer, length):
    tokenizer = phi3.load_tokenizer(tiny_tokenizer)
    model = reciting_model(tokenizer, TEXT)
    pieces = list(phi3.stream(model, tokenizer, QUESTION, max_new_tokens=length))
    assert "".join(pieces) == phi3.generate(model, tokenizer, QUESTION, max_new_tokens=length)


@pytest.mark.parametrize("seed", range(20))
def test_streamed_pieces_of_random_bytes_join_to_the_answer(chat, seed):
    settings = {"max_new_tokens": 30, "temperature": 2.0, "seed": seed}
    assert "".join(phi3.stream(*chat, QUESTION, **settings)) == phi3.generate(*chat, QUESTION, **settings)


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3"])
def test_streamed_pieces_of_a_published_tokenizer_join_to_the_answer(shared, name):
    tokenizer = phi3.load_tokenizer(shared / "tokenizers" / name)
    model = tiny_model(tiny_config(vocab_size=32064, hidden_size=8, num_hidden_layers=1))
    for seed in range(10):
        settings = {"max_new_tokens": 30, "temperature": 3.0, "seed": seed}
        answer = phi3.generate(model, tokenizer, QUESTION, **settings)
        assert "".join(phi3.stream(model, tokenizer, QUESTION, **settings)) == answer


def test_prompt_and_answer_must_fit_into_the_model():
    model = tiny_model(tiny_config(max_position_embeddings=20))
    assert len(answers(model, [[1] * 12, [1]], max_new_tokens=8)[0]) == 8
    message = "the prompt of 13 tokens and 8 new ones pass the model's limit of 20: shorten the conversation or max_new_tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        answers(model, [[1] * 13, [1]], max_new_tokens=8)


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_no_prompt_and_an_empty_prompt_are_refused(prompts):
    with pytest.raises(ValueError, match=r"^generation needs at least one prompt, and no empty one$"):
        answers(tiny_model(tiny_config()), prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, not nan"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], not 0.0"),
        ({"top_p": 1.1}, "top_p must lie in (0, 1], not 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must lie in (0, inf), not 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must lie in (0, inf), not inf"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must lie in (0, inf), not nan"),
        (
            {"max_new_tokens": -1, "temperature": -1, "top_k": -1, "top_p": 2},
            "max_new_tokens must be at least 1, not -1; temperature must be at least 0, not -1; "
            "top_k must be at least 1, not -1; top_p must lie in (0, 1], not 2",
        ),
    ],
)
def test_settings_out_of_range_are_refused_all_at_once(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        phi3.Sampling(**settings)


def test_the_ends_of_the_ranges_are_allowed():
    phi3.Sampling(max_new_tokens=1, temperature=0.0, top_k=1, top_p=1.0)
