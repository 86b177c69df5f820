"""Text to token ids and back, and conversations to token ids by the checkpoint's own chat template."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as TokenizerFile

from minilora.phi3.hub import TEXT_FILES, fetch

# {"role": "system" | "user" | "assistant" | …, "content": text}, and whatever text more the template asks for: "tools", say
Message = dict[str, str]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "generation_config.json",
)  # fmt: skip


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, by which templates mark an answer: written as if the tags were not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's spelling)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json with its chat template. Nothing is added to a text on its own: no BOS, no EOS; the template has them."""

    file: TokenizerFile
    template: str  # Jinja
    special: dict[str, str]  # "bos_token", "eos_token", … to their texts, as the template may ask for them
    stop_ids: frozenset[int]  # ids that end an answer

    def encode(self, text: str) -> list[int]:
        return self.file.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, by default without special tokens."""
        return self.file.decode(ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """Texts that become one special token wherever they stand."""
        return frozenset(token.content for token in self.file.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def digest(self) -> str:
        """A hash of all that encode_chat's results follow from beside the messages: settings, libraries and this file itself."""
        settings = [self.file.to_str(), self.template, sorted(self.special.items()), sorted(self.stop_ids)]
        libraries = [version("tokenizers"), version("jinja2")]
        return sha256(json.dumps([settings, libraries]).encode() + Path(__file__).read_bytes()).hexdigest()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The template comes with a downloaded checkpoint: it runs in Jinja's sandbox. Trimming as transformers does.
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own is for HTML
        environment.globals["raise_exception"] = _raise_template_error
        return environment.from_string(self.template)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it; add_generation_prompt ends with the opening of an answer.

        Raises:
            ValueError: the template refuses these messages or cannot be rendered.
        """
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self.special
            )
        except Exception as error:  # the template is a stranger's program, and may fail in any way
            raise ValueError(f"the chat template cannot render this conversation: {error}") from None

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation and of the opening of the answer to it."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them the assistant is to learn: its turns with their end token.

        Found from the ids of whole turns: what the prompt of a turn does not hold, up to the token that ends the turn.

        Returns:
            ids and mask, of one length.

        Raises:
            ValueError: a text spells a special token, a turn has no end, or the template writes a turn otherwise once it is past,
                or writes nothing of tools or of what they answered.
        """
        for message in messages:
            spelled = sorted(text for text in self.special_texts if any(text in str(value) for value in message.values()))
            if spelled:
                raise ValueError(f"the {message['role']} text spells the special token {spelled[0]}: remove it from the text")
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self.render(messages)
        self._check_tools_are_written(messages, whole)
        prompts = [self.render(messages[:turn], add_generation_prompt=True) for turn in turns]
        ends = [self.render(messages[: turn + 1]) if turn + 1 < len(messages) else whole for turn in turns]
        ids_of = self._encode_all([whole, *prompts, *ends])
        ids, mask = ids_of[whole], [False] * len(ids_of[whole])
        for turn, prompt, turn_and_before in zip(turns, map(ids_of.get, prompts), map(ids_of.get, ends), strict=True):
            if ids[: len(prompt)] != prompt:
                raise ValueError(f"the chat template writes what precedes turn {turn + 1} otherwise once the turn is there")
            end = next((i for i in range(len(prompt), len(ids)) if ids[i] in self.stop_ids), None)
            if end is None or ids[: end + 1] != turn_and_before[: end + 1]:
                raise ValueError(f"the chat template ends turn {turn + 1} with none of the stop tokens {sorted(self.stop_ids)}")
            mask[len(prompt) : end + 1] = [True] * (end + 1 - len(prompt))
        return ids, mask

    def _check_tools_are_written(self, messages: list[Message], whole: str) -> None:
        """Refuses tools and their answers that a template drops in silence: a change of their text changes nothing."""
        dropped = []
        for turn, message in enumerate(messages):
            for key in ("tools", "content") if message["role"] == "tool" else ("tools",):
                if key in message:
                    changed = [*messages[:turn], message | {key: f"{message[key]}?"}, *messages[turn + 1 :]]
                    if self.render(changed) == whole:
                        dropped.append(f"the {key} of turn {turn + 1} ({message['role']})")
        if dropped:
            raise ValueError(f"the chat template writes nothing of {', '.join(dropped)}: leave it out, or take another model")

    def _encode_all(self, texts: list[str]) -> dict[str, list[int]]:
        """Each text's token ids, found on all cores at once."""
        distinct = list(dict.fromkeys(texts))
        found = self.file.encode_batch_fast(distinct, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(distinct, found, strict=True)}


def _raise_template_error(message: str):
    raise jinja2.TemplateError(message)


def load_tokenizer(path: Path | str, revision: str | None = None) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a checkpoint.

    The template is chat_template.jinja where there is one, else `chat_template` of tokenizer_config.json. Answers stop at any
    `eos_token_id` of generation_config.json, else of config.json, and at the tokenizer's own eos_token.

    Args:
        path: a folder, or the id of a repository on the hub, of which no weights are downloaded (see hub.fetch, whose errors
            are raised too).
        revision: branch, tag or commit of a repository on the hub.

    Raises:
        FileNotFoundError: tokenizer.json or tokenizer_config.json is missing.
        ValueError: a file cannot be read, there is no chat template, or no token that ends an answer.
    """
    folder = fetch(path, revision, TEXT_FILES)
    try:
        file = TokenizerFile.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} must hold tokenizer.json") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
    settings = _read_json(folder / "tokenizer_config.json")
    special = {
        name: _text(value) for name, value in settings.items() if name.endswith("_token") and isinstance(value, str | dict)
    }
    stop_ids = _stop_ids(folder)
    if "eos_token" in special:
        stop_ids |= {file.token_to_id(special["eos_token"])}
    stop_ids.discard(None)
    if not stop_ids:
        raise ValueError(f"{folder} names no token that ends an answer: give eos_token in tokenizer_config.json")
    return Tokenizer(file, _template(folder, settings), special, frozenset(stop_ids))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} must hold {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _text(token: str | dict) -> str:
    """tokenizer_config.json writes a special token as its text, or as an object that holds it."""
    return token["content"] if isinstance(token, dict) else token


def _stop_ids(folder: Path) -> set[int | None]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ids = _read_json(folder / name).get("eos_token_id")
            if ids is not None:
                return set(ids) if isinstance(ids, list) else {ids}
    return set()


def _template(folder: Path, settings: dict) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not template:
        raise ValueError(f"{folder} has no chat template: give chat_template.jinja, or chat_template in tokenizer_config.json")
    return template


def copy_tokenizer(source: Path | str, target: Path | str) -> None:
    """Copies the files of a checkpoint that load_tokenizer and transformers read beside the weights."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)
