import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.conversations import Conversation
from minilora.data.mixture import draw, split


def talks(count, source="chat.jsonl"):
    return [
        Conversation([{"role": "user", "content": str(i)}, {"role": "assistant", "content": "yes"}], f"{source}:{i}")
        for i in range(count)
    ]


def texts(conversations):
    return {conversation.messages[0]["content"] for conversation in conversations}


@given(st.lists(st.integers(0, 30), max_size=60), st.floats(0, 0.99), st.integers(0, 9))
def test_no_conversation_is_on_both_sides_and_none_is_lost(numbers, share, seed):
    conversations = [talks(31)[i] for i in numbers]
    kept, held_out = split(conversations, share, seed)
    assert not texts(kept) & texts(held_out)
    assert sorted(c.source for c in kept + held_out) == sorted(c.source for c in conversations)


def test_about_the_share_is_held_out_and_the_seed_decides_which():
    conversations = talks(4000)
    held = [texts(split(conversations, 0.05, seed)[1]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert all(150 < len(side) < 250 for side in held)  # 200 expected, of standard deviation 14
    assert len(held[0] & held[2]) < 30  # 10 expected
    assert split(conversations, 0.0, 0)[1] == []


def test_data_added_later_and_copies_in_other_files_move_no_conversation():
    few, many = split(talks(100), 0.3, 0)[1], split(talks(200, "other.jsonl"), 0.3, 0)[1]
    assert texts(few) == {text for text in texts(many) if int(text) < 100}


@pytest.mark.parametrize("share", [-0.1, 1.0, 5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        split(talks(3), share, 0)


@given(st.integers(0, 40), st.floats(0.01, 3.5), st.integers(0, 9))
def test_each_conversation_comes_as_often_as_its_weight_says_but_for_rounding(count, weight, seed):
    drawn = draw(talks(count), weight, seed)
    times = [sum(c.source == f"chat.jsonl:{i}" for c in drawn) for i in range(count)]
    assert abs(len(drawn) - weight * count) <= 0.5 + 1e-9
    assert all(int(weight) <= time <= int(weight) + 1 for time in times)


def test_what_is_drawn_follows_from_the_seed_and_keeps_its_order():
    drawn = [[c.source for c in draw(talks(50), 0.3, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [int(source.split(":")[1]) for source in drawn[0]] == sorted(int(source.split(":")[1]) for source in drawn[0])
    assert len(drawn[0]) == 15


def test_a_weight_of_one_is_every_conversation_once():
    assert draw(talks(9), 1.0, 0) == talks(9)
