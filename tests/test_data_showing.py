import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import phi3
from minilora.data.conversations import Conversation
from minilora.data.encoding import Example, encode_conversations
from minilora.data.packing import pack
from minilora.data.showing import show_batch


def talk(question, answer):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "chat.jsonl:1")


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return phi3.load_tokenizer(tiny_checkpoint)


def whole(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def test_what_is_learnt_is_marked_and_special_tokens_are_shown(tokenizer):
    examples = encode_conversations([talk("Where?", "Here é."), talk("a", "b")], tokenizer, 1000)
    shown = show_batch(examples, whole(tokenizer), colour=False)
    assert shown.splitlines() == [
        f"── row 1: {len(examples[0].ids)} tokens, 9 learnt ".ljust(78, "─"),
        "<|im_start|>user", "Where?<|im_end|>", "<|im_start|>assistant", "⟦Here é.<|im_end|>⟧", "",
        f"── row 2: {len(examples[1].ids)} tokens, 2 learnt ".ljust(78, "─"),
        "<|im_start|>user", "a<|im_end|>", "<|im_start|>assistant", "⟦b<|im_end|>⟧",
    ]  # fmt: skip


def test_on_a_terminal_what_is_learnt_is_green(tokenizer):
    examples = encode_conversations([talk("Where?", "Here.")], tokenizer, 1000)
    plain, green = (show_batch(examples, whole(tokenizer), colour) for colour in (False, True))
    assert "\033" not in plain
    assert green == plain.replace("⟦", "\033[32m").replace("⟧", "\033[0m")


def test_the_documents_of_a_packed_row_are_told_apart(tokenizer):
    examples = encode_conversations([talk("first", "one"), talk("second", "two"), talk("third", "three")], tokenizer, 1000)
    shown = show_batch(pack(examples, 1000), whole(tokenizer), colour=False)
    alone = [show_batch([example], whole(tokenizer), colour=False).partition("\n")[2] for example in examples]
    documents = re.split(r"── document \d: \d+ tokens ──\n", shown)[1:]
    assert [document.strip() for document in documents] == [alone[i].strip() for i in (2, 1, 0)]


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"])), st.text(alphabet="ab\x1b\x9b\x07\r\n\t", min_size=1))
def test_data_cannot_steer_the_terminal(tokenizer, question, answer):
    ids = tokenizer.encode(question + answer)
    shown = show_batch([Example(ids, [False] * len(ids))], whole(tokenizer), colour=True)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_pieces_are_spelled_as_in_their_whole(shared):
    """A SentencePiece decoder drops the space that begins a text: the pieces of a row must not lose theirs."""
    tokenizer = phi3.load_tokenizer(shared / "tokenizers" / "phi-3-mini")
    ids = tokenizer.encode("to be or not to be")
    shown = show_batch([Example(ids, [i % 2 == 1 for i in range(len(ids))])], whole(tokenizer), colour=False)
    assert re.sub("[⟦⟧]", "", shown.partition("\n")[2]) == tokenizer.decode(ids) == "to be or not to be"
