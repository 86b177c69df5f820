import json

import pytest

from minilora import phi3
from minilora.config import RunConfig
from minilora.data.preparation import count_shared, gather, prepare
from minilora.training.config import TrainConfig


def write(path, numbers):
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x" * n}] for n in numbers]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return phi3.load_tokenizer(tiny_checkpoint)


def asked(conversations):
    return [int(conversation.messages[0]["content"]) for conversation in conversations]


def test_sources_are_joined_by_their_weights_and_a_share_of_each_is_held_out_once(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", range(1, 101)), write(tmp_path / "b.jsonl", range(51, 151))
    kept, held_out = gather([a, f"{b}=2"], seed=0, eval_share=0.2)
    assert not set(asked(kept)) & set(asked(held_out))
    assert set(asked(kept)) | set(asked(held_out)) == set(range(1, 151))
    assert [asked(kept).count(n) for n in (min(asked(kept)), max(asked(kept)))] == [1, 2]
    said = capsys.readouterr().out.splitlines()
    held = sum(conversation.source.startswith(b) for conversation in held_out)
    assert said[1] == f"{b}: 100 conversations, {held} held out, {2 * (100 - held)} an epoch by the weight 2"


def test_a_share_that_holds_out_nothing_is_told(tmp_path):
    with pytest.raises(ValueError, match="a share of 1e-09 holds out none of 5 conversations: raise it"):
        gather([write(tmp_path / "a.jsonl", range(1, 6))], 0, 1e-9)


def test_lengths_are_told_before_a_conversation_that_is_too_long_is_refused(tmp_path, tokenizer, capsys):
    conversations, _ = gather([write(tmp_path / "a.jsonl", [1, 2, 300])], 0)
    run = RunConfig(TrainConfig(max_seq_length=100))
    with pytest.raises(ValueError, match="1 of 3 conversations are longer than 100 tokens"):
        prepare(conversations, tokenizer, run, drop_long=False)
    assert "1 longer than max_seq_length 100 (33.3%)" in capsys.readouterr().out
    assert len(prepare(conversations, tokenizer, run, drop_long=True)) == 2
    assert "1 longer than 100 left out, 2 conversations stay" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all 3 conversations are longer than 9 tokens"):
        prepare(conversations, tokenizer, RunConfig(TrainConfig(max_seq_length=9)), drop_long=True)


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_the_run_says_whether_every_token_is_learnt(tmp_path, tokenizer, assistant_only_loss):
    conversations, _ = gather([write(tmp_path / "a.jsonl", [5])], 0)
    (example,) = prepare(conversations, tokenizer, RunConfig(assistant_only_loss=assistant_only_loss), drop_long=False)
    assert sum(example.mask) == (6 if assistant_only_loss else len(example.ids))


def test_no_conversation_at_all_is_refused(tmp_path, tokenizer):
    conversations, _ = gather([write(tmp_path / "a.jsonl", [5]) + "=0.1"], 0)
    with pytest.raises(ValueError, match="no conversation is left"):
        prepare(conversations, tokenizer, RunConfig(), drop_long=False)


def test_conversations_on_both_sides_are_counted(tmp_path):
    ours, _ = gather([write(tmp_path / "a.jsonl", [1, 2, 3])], 0)
    others, _ = gather([write(tmp_path / "b.jsonl", [3, 4, 2, 3])], 0)
    assert count_shared(ours, others) == 2
    assert count_shared(others, ours) == 3
