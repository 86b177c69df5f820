"""Tokenizers, chat templates and the mask of what an assistant learns, on bytes and on the published Phi-3 tokenizers.

Templates that lie in no published folder among the test data are written down here: those of Phi-3.5 and Phi-4 render every
conversation as the published ones do, Phi-3-medium's is Phi-3's older one without its BOS, and Phi-4-reasoning's has its
instructions shortened.
"""

import json
import re
import shutil

import pytest
from helpers import CHATML, SPECIAL, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minilora import phi3

END = SPECIAL["<|im_end|>"]
HELLO = [{"role": "user", "content": "Hello"}]
awkward = st.sampled_from([" ", "  ", "\n", "\t", "Hello", "é", "😶‍🌫️", "<|", "|>", "<|end", "assistant", "0"])
texts = st.lists(awkward | st.text(max_size=4), max_size=6).map("".join)
texts = texts.filter(lambda text: not re.search(r"<\|\w+\|>|<s>|</s>|<unk>|▁", text))  # special tokens, SentencePiece's space
conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)  # (user, assistant) turns


def messages_of(turns):
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return phi3.load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module", params=["phi-3-mini", "phi-3"])
def published(request, shared, tmp_path_factory) -> tuple[str, phi3.Tokenizer]:
    """The name of a published tokenizer, and the tokenizer with the generation_config.json that belongs to it."""
    folder = tmp_path_factory.mktemp("published") / request.param
    copy_published(shared, request.param, folder)
    return request.param, phi3.load_tokenizer(folder)


def copy_published(shared, name, folder):
    shutil.copytree(shared / "tokenizers" / name, folder)
    shutil.copyfile(shared / "configs" / "Phi-3-mini-4k-instruct.generation_config.json", folder / "generation_config.json")


def change_settings(folder, **settings):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")


@given(st.text())
def test_decode_undoes_encode(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_a_special_token_is_one_id_and_is_left_out_of_the_text(tiny):
    ids = tiny.encode("<|im_start|>é<|im_end|>")
    assert (ids[0], len(ids), ids[-1]) == (SPECIAL["<|im_start|>"], 4, END)
    assert tiny.decode(ids) == "é"
    assert tiny.special_texts == set(SPECIAL)


def test_nothing_is_added_to_a_text_on_its_own(tmp_path):
    write_tokenizer(tmp_path)
    file = TokenizerFile.from_file(str(tmp_path / "tokenizer.json"))
    file.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    file.save(str(tmp_path / "tokenizer.json"))
    assert file.encode("a").ids[0] == 256  # what the file itself would do
    assert len(phi3.load_tokenizer(tmp_path).encode("a")) == 1


def test_known_encodings_of_the_published_tokenizers(published):
    expected = {
        "phi-3-mini": [32010, 15043, 32007, 32001],
        "phi-3": [32010, 29871, 13, 10994, 32007, 29871, 13, 32001, 29871, 13],
    }
    name, tokenizer = published
    assert tokenizer.encode("<|user|>\nHello<|end|>\n<|assistant|>\n") == expected[name]
    assert tokenizer.stop_ids == {32000, 32001, 32007}


def test_golden_texts_of_llama_cpp_encode_as_there(shared):
    tokenizer = phi3.load_tokenizer(shared / "tokenizers" / "phi-3-mini")
    golden = shared / "tokenizers" / "golden"
    given = (golden / "phi-3.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [list(map(int, line.split())) for line in (golden / "phi-3.out").read_text().split("\n")]
    assert (given.pop(), expected.pop()) == ("", [])
    assert len(given) == 46
    for text, ids in zip(given, expected, strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize("template_of", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("open_answer", [False, True])
def test_rendering_of_phi_4_mini_equals_that_of_transformers(shared, tmp_path, template_of, open_answer):
    write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", template_of):
        shutil.copyfile(shared / "tokenizers" / "phi-4-mini" / name, tmp_path / name)
    tokenizer = phi3.load_tokenizer(tmp_path)
    assert ("AI math expert" in tokenizer.template) == (template_of == "chat_template.jinja")
    system = {"role": "system", "content": "Answer \n briefly. "}
    assert_renders_as_transformers(tokenizer, [system, *HELLO, {"role": "assistant", "content": "Hi"}], open_answer)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n  {{ m.content | trim }}\n  {% endif %}\n{% endfor %}\nend\n",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}{{ unknown }}",
        "{% if tools is not none %}tools{% endif %}{{ bos_token }}|{{ eos_token }}|{{ messages | length }}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}",
        "{% set x = 1 %}{% for m in messages %}\n{% generation %}\n{{ m.content }} {% endgeneration %}\n{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "  {% set ns = namespace(n=0) %} \n {# note #}\n{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}\n{{ ns.n }}",
    ],
)
def test_trimming_and_extensions_are_those_of_transformers(tmp_path, template):
    write_tokenizer(tmp_path, template)
    messages = [*HELLO, {"role": "assistant", "content": " Hi <b> & 'you' é"}]
    assert_renders_as_transformers(phi3.load_tokenizer(tmp_path), messages, True)


def assert_renders_as_transformers(tokenizer, messages, open_answer):
    settings = {"chat_template": tokenizer.template, "add_generation_prompt": open_answer} | tokenizer.special
    (expected,), _ = render_jinja_template([messages], **settings)
    assert tokenizer.render(messages, add_generation_prompt=open_answer) == expected


def test_a_prompt_ends_with_the_opening_of_the_answer(tiny):
    ids = tiny.encode_prompt(HELLO)
    assert ids == tiny.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'content': 'y'}) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_that_reaches_out_of_the_sandbox_is_refused(tmp_path, template):
    write_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=r"^the chat template cannot render this conversation: .*(unsafe|not safely callable)"):
        phi3.load_tokenizer(tmp_path).render(HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages | nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("{{ nosuchfunction() }}", "'nosuchfunction' is undefined"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a'.index('b') }}", "not found"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_that_fails_or_refuses_is_an_error_with_its_reason(tmp_path, template, reason):
    write_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match="^the chat template cannot render this conversation: .*" + re.escape(reason)):
        phi3.load_tokenizer(tmp_path).render(HELLO)


@given(conversations)
def test_the_assistant_learns_exactly_its_contents_and_end_tokens(tiny, turns):
    ids, mask = tiny.encode_chat(messages_of(turns))
    learnt = [id_ for id_, learn in zip(ids, mask, strict=True) if learn]
    assert learnt == tiny.encode("".join(answer + "<|im_end|>" for _, answer in turns))
    assert ids == tiny.encode(tiny.render(messages_of(turns)))


def test_the_digest_is_that_of_all_that_decides_the_ids_and_the_mask(tmp_path):
    def digest(name, template=CHATML, **settings):
        write_tokenizer(tmp_path / name, template, **settings)
        return phi3.load_tokenizer(tmp_path / name).digest

    usual = digest("usual")
    assert digest("same") == usual
    assert digest("unread setting", model_max_length=7) == usual
    others = [
        digest("template", CHATML + " "),
        digest("end", eos_token="<|endoftext|>"),
        digest("text", bos_token="<|im_start|>"),
    ]
    changed = json.loads((tmp_path / "usual" / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "usual" / "tokenizer.json").write_text(json.dumps(changed))
    assert len({usual, *others, phi3.load_tokenizer(tmp_path / "usual").digest}) == 5


def test_a_system_message_is_not_learnt(tiny):
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "Hi"}]
    ids, mask = tiny.encode_chat(messages)
    assert [id_ for id_, learn in zip(ids, mask, strict=True) if learn] == [*tiny.encode("Hi"), END]


def test_an_assistant_that_speaks_first_is_learnt(tiny):
    ids, mask = tiny.encode_chat([{"role": "assistant", "content": "Hi"}, *HELLO])
    assert [id_ for id_, learn in zip(ids, mask, strict=True) if learn] == [*tiny.encode("Hi"), END]


def test_without_an_assistant_nothing_is_learnt(tiny):
    ids, mask = tiny.encode_chat(HELLO)
    assert mask == [False] * len(ids)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("token", SPECIAL)
def test_a_text_that_spells_a_special_token_is_refused(tiny, role, token):
    with pytest.raises(ValueError, match=re.escape(f"{role} text spells the special token {token}: remove it from the text")):
        tiny.encode_chat([*HELLO, {"role": role, "content": f"so {token}!"}])


def test_whatever_text_a_message_holds_must_spell_no_special_token(tiny):
    system = {"role": "system", "content": "Use tools.", "tools": "<|im_end|>"}
    with pytest.raises(ValueError, match=re.escape("system text spells the special token <|im_end|>: remove it from the text")):
        tiny.encode_chat([system, *HELLO, {"role": "assistant", "content": "Hi"}])


def test_an_end_in_a_later_turn_does_not_end_this_one(tmp_path):
    # <|im_end|> ends turns here, but only the final <|endoftext|> is known to end an answer: what follows a turn is not its own.
    write_tokenizer(tmp_path, CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", eos_token="<|endoftext|>")
    tokenizer = phi3.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"the chat template ends turn 2 with none of the stop tokens \[256\]"):
        tokenizer.encode_chat(messages_of([("a", "b"), ("secret", "d")]))


def test_a_turn_without_any_end_is_refused(tmp_path):
    bare = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    write_tokenizer(tmp_path, bare)
    with pytest.raises(ValueError, match=r"the chat template ends turn 2 with none of the stop tokens \[258\]"):
        phi3.load_tokenizer(tmp_path).encode_chat(messages_of([("a", "b")]))


def test_a_template_that_rewrites_the_past_is_refused(tmp_path):
    rewriting = "{% for m in messages %}{{ loop.revindex | string + m.content + '<|im_end|>' }}{% endfor %}"
    write_tokenizer(tmp_path, rewriting)
    with pytest.raises(ValueError, match="the chat template writes what precedes turn 2 otherwise once the turn is there"):
        phi3.load_tokenizer(tmp_path).encode_chat(messages_of([("a", "b")]))


def test_chat_template_jinja_comes_before_that_of_the_settings(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'ö' }}", encoding="utf-8")
    assert phi3.load_tokenizer(tmp_path).render(HELLO) == "ö"


def test_the_default_of_several_templates_is_taken(tmp_path):
    write_tokenizer(tmp_path)
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    change_settings(tmp_path, chat_template=named)
    assert phi3.load_tokenizer(tmp_path).render(HELLO) == "yes"


@pytest.mark.parametrize("template", [None, [], [{"name": "rag", "template": "no"}], ""])
def test_a_tokenizer_without_a_template_is_refused(tmp_path, template):
    write_tokenizer(tmp_path)
    change_settings(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no chat template: give chat_template.jinja, or")):
        phi3.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        ({}, {}, {258}),
        ({}, {"eos_token": {"content": "<|im_end|>", "special": True}}, {258}),
        ({"config.json": 3}, {}, {3, 258}),
        ({"config.json": 3, "generation_config.json": [4, 5]}, {}, {4, 5, 258}),
        ({"config.json": [3], "generation_config.json": None}, {}, {3, 258}),
        ({"config.json": 3}, {"eos_token": None}, {3}),
        ({"config.json": 3}, {"eos_token": "not in the vocabulary"}, {3}),
    ],
)
def test_answers_end_at_any_id_that_the_checkpoint_names(tmp_path, files, settings, expected):
    write_tokenizer(tmp_path)
    change_settings(tmp_path, **settings)
    for name, ids in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    assert phi3.load_tokenizer(tmp_path).stop_ids == expected


@pytest.mark.parametrize("eos", [None, "not in the vocabulary"])
def test_a_tokenizer_without_an_end_of_answers_is_refused(tmp_path, eos):
    write_tokenizer(tmp_path)
    change_settings(tmp_path, eos_token=eos)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} names no token that ends an answer: give eos_token in")):
        phi3.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} must hold {name}")):
        phi3.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        phi3.load_tokenizer(tmp_path)


def test_a_copied_tokenizer_is_the_same_and_brings_no_other_file(tmp_path, tiny_tokenizer):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny_tokenizer, source)
    target.mkdir()
    (source / "chat_template.jinja").write_text("{{ 'other' }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [7]}')
    (source / "model.safetensors").write_bytes(b"weights")
    phi3.copy_tokenizer(source, target)
    beside_the_weights = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in target.iterdir()} == beside_the_weights
    ours, theirs = phi3.load_tokenizer(target), phi3.load_tokenizer(source)
    assert (ours.template, ours.special, ours.stop_ids) == (theirs.template, theirs.special, theirs.stop_ids)
    assert ours.file.to_str() == theirs.file.to_str()


# The templates of the family ----------------------------------------------------------------------------------------

PHI_3_5 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_3_MEDIUM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)
PHI_4 = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
INSTRUCTIONS = "<|im_start|>system<|im_sep|>You are Phi, who reasons in a <think> section first:<|im_end|>"
PHI_4_REASONING = (
    INSTRUCTIONS + "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# variant → folder of its tokenizer, a template in the place of that folder's
VARIANTS = {
    "phi-3-mini-4k": ("phi-3-mini", None),
    "phi-3-mini-128k": ("phi-3", None),
    "phi-3.5-mini": ("phi-3-mini", PHI_3_5),
    "phi-3-medium-4k": ("phi-3-mini", PHI_3_MEDIUM),
    "phi-3-medium-128k": ("phi-3", PHI_3_MEDIUM),
    "phi-4": ("phi-4", PHI_4),
    "phi-4-reasoning": ("phi-4", PHI_4_REASONING),
    "phi-4-mini": ("phi-4-mini", None),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, shared, tmp_path_factory):
    """A variant's name, its tokenizer, and the same files in transformers: those of Phi-4 and Phi-4-mini split into bytes."""
    source, template = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant") / request.param
    if source == "phi-4":
        write_tokenizer(folder, eos_token="<|im_end|>")
        add_tokens(folder, [AddedToken("<|im_sep|>", special=True)])
    elif source == "phi-4-mini":
        settings = json.loads((shared / "tokenizers" / source / "tokenizer_config.json").read_text())
        write_tokenizer(folder, settings["chat_template"], eos_token=settings["eos_token"], bos_token=settings["bos_token"])
        add_tokens(folder, [AddedToken(**token) for token in settings["added_tokens_decoder"].values()])
        end = TokenizerFile.from_file(str(folder / "tokenizer.json")).token_to_id("<|end|>")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, SPECIAL["<|endoftext|>"]]}))
    else:
        copy_published(shared, source, folder)
    if template:
        change_settings(folder, chat_template=template)
    return request.param, phi3.load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def add_tokens(folder, tokens):
    file = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    for token in tokens:
        (file.add_special_tokens if token.special else file.add_tokens)([token])
    file.save(str(folder / "tokenizer.json"))


def spelled(name: str, messages: list[dict]) -> list[tuple[str, bool]]:
    """A conversation as the variant writes it: pieces of text, and whether the assistant is to learn them."""
    pieces = {"phi-3-mini-128k": [("<s>", False)], "phi-4-reasoning": [(INSTRUCTIONS, False)]}.get(name, [])
    for message in messages:
        role, text = message["role"], message["content"]
        answer = role == "assistant"
        if name in ("phi-3-mini-4k", "phi-3.5-mini") and role != "tool" and (text or role != "system" or name != "phi-3.5-mini"):
            pieces += [(f"<|{role}|>\n", False), (f"{text}<|end|>", answer), ("\n", False)]
        elif name in ("phi-3-mini-128k", "phi-3-medium-4k", "phi-3-medium-128k") and role in ("user", "assistant"):
            pieces += [("" if answer else "<|user|>\n", False), (f"{text}<|end|>", answer)]
            pieces += [("\n" if answer else "\n<|assistant|>\n", False)]
        elif name == "phi-4-mini":
            tools = f"<|tool|>{message['tools']}<|/tool|>" if "tools" in message else ""
            pieces += [(f"<|{role}|>", False), (f"{text}{tools}<|end|>", answer)]
        elif (name == "phi-4" and role != "tool") or (name == "phi-4-reasoning" and role in ("user", "assistant")):
            pieces += [(f"<|im_start|>{role}<|im_sep|>", False), (f"{text}<|im_end|>", answer)]
    return [*pieces, ("<|endoftext|>" if name in ("phi-3-mini-4k", "phi-3.5-mini", "phi-4-mini") else "", False)]


@st.composite
def family_conversations(draw) -> list[dict]:
    """With or without a system message, with or without tools and their results; any text may be empty."""
    system = draw(st.sampled_from([(), ("content",), ("content", "tools")]))
    messages = [{"role": "system", **{key: draw(texts) for key in system}}] if system else []
    for _ in range(draw(st.integers(1, 3))):
        roles = draw(st.sampled_from([("user", "assistant"), ("user", "assistant", "tool", "assistant")]))
        messages += [{"role": role, "content": draw(texts)} for role in roles]
    return messages


@given(family_conversations(), st.booleans())
def test_a_template_renders_as_in_transformers(variant, messages, open_answer):
    name, ours, theirs = variant
    asked = messages[:-1] if open_answer else messages
    rendered = ours.render(asked, add_generation_prompt=open_answer)
    assert rendered == theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=open_answer)
    ids = theirs.apply_chat_template(asked, add_generation_prompt=open_answer, return_dict=False)
    assert (ours.encode_prompt(asked) if open_answer else ours.encode(rendered)) == ids
    if not open_answer:
        assert rendered == "".join(text for text, _ in spelled(name, messages))


def has_tools(messages) -> bool:
    return any(message["role"] == "tool" or "tools" in message for message in messages)


@given(family_conversations())
def test_tools_are_refused_wherever_a_template_would_drop_them(variant, messages):
    name, tokenizer, _ = variant
    if not has_tools(messages) or name == "phi-4-mini":
        assert tokenizer.encode_chat(messages)[0] == tokenizer.encode(tokenizer.render(messages))
        return
    with pytest.raises(ValueError, match="the chat template writes nothing of ") as refused:
        tokenizer.encode_chat(messages)
    for turn, message in enumerate(messages, start=1):
        assert (f"the content of turn {turn} (tool)" in str(refused.value)) == (message["role"] == "tool")
        assert (f"the tools of turn {turn} (system)" in str(refused.value)) == ("tools" in message)


def test_tools_of_another_turn_than_the_systems_are_refused_by_phi_4_mini(shared, tmp_path):
    write_tokenizer(tmp_path)
    shutil.copyfile(shared / "tokenizers" / "phi-4-mini" / "chat_template.jinja", tmp_path / "chat_template.jinja")
    messages = [{"role": "user", "content": "Hi", "tools": "[]"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ValueError, match=re.escape("writes nothing of the tools of turn 1 (user): leave it out")):
        phi3.load_tokenizer(tmp_path).encode_chat(messages)


@given(family_conversations())
def test_under_each_template_exactly_the_answers_and_their_ends_are_learnt(variant, messages):
    name, tokenizer, _ = variant
    if name != "phi-4-mini":
        keys = ("role", "content")
        messages = [{key: message[key] for key in keys} for message in messages if message["role"] != "tool"]
    text, spans = "", []
    for piece, learnt in spelled(name, messages):
        if learnt:
            spans.append(range(len(text), len(text + piece)))
        text += piece
    encoded = tokenizer.file.encode(text, add_special_tokens=False)
    ids, mask = tokenizer.encode_chat(messages)
    assert ids == encoded.ids
    assert mask == [any(start in span for span in spans) for start, _ in encoded.offsets]
    answers = [[]]
    for id_, learnt in zip(ids, mask, strict=True):
        if learnt:
            answers[-1].append(id_)
            if id_ in tokenizer.stop_ids:
                answers.append([])
    assert answers.pop() == []  # each answer ends with its end token
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for learnt, answer in zip(answers, said, strict=True):
        if name.endswith("128k"):
            assert tokenizer.decode(learnt) == answer.removeprefix(" ")  # as SentencePiece decodes any text
        else:  # the tokens of a role may swallow white space
            assert tokenizer.decode(learnt).lstrip() == answer.lstrip()
