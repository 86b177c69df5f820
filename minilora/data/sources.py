"""Where conversations come from: files here and files of data sets on the Hugging Face hub, each with a weight."""

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from minilora.data.conversations import Conversation, read_conversations

HUB_FILES = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<pattern>.+)")


@dataclass(frozen=True)
class Source:
    """Files of conversations, and how many times each of these comes in an epoch: minilora.data.mixture."""

    name: str  # a file, or files on the hub as hf://datasets/OWNER/NAME/PATH, where PATH may hold *
    weight: float = 1.0


def parse_source(text: str) -> Source:
    """A source written as NAME or NAME=WEIGHT.

    Raises:
        ValueError: the weight is no positive number.
    """
    name, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return Source(text)
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{text}: what follows = is the weight, and must be a positive number, not {weight!r}")
    return Source(name, number)


def read_source(source: Source) -> list[Conversation]:
    """All conversations of a source, its files in the order of their names; errors as in read_conversations and files."""
    return [conversation for file in files(source.name) for conversation in read_conversations(file)]


def files(name: str) -> list[Path]:
    """The files that a name means: one here, or those on the hub that match, downloaded once into huggingface_hub's cache.

    On the hub a name is spelled as pandas, DuckDB and Polars spell it: hf://datasets/OWNER/NAME/PATH of the main branch, or
    OWNER/NAME@REVISION; @~parquet is the branch in which the hub keeps every data set as Parquet.

    Raises:
        ValueError: hf:// begins something else.
        FileNotFoundError: no file on the hub matches.
        ConnectionError: the hub has no such data set or revision, asks for a token, or cannot be reached.
    """
    if not name.startswith("hf://"):
        return [Path(name)]
    from huggingface_hub import constants, snapshot_download  # here, since they take 0.2 s, and a file needs none of them
    from huggingface_hub.errors import HTTPError

    found = HUB_FILES.fullmatch(name)
    if not found:
        raise ValueError(f"{name} must be hf://datasets/OWNER/NAME/PATH, where PATH names files and may hold *")
    revision = found["revision"] and unquote(found["revision"]).replace("~", "refs/convert/")
    try:
        folder = snapshot_download(
            found["repository"], repo_type="dataset", revision=revision, allow_patterns=[found["pattern"]]
        )  # fmt: skip
    except (HTTPError, OSError) as error:
        raise ConnectionError(f"{name} could not be had from {constants.ENDPOINT}: {' '.join(str(error).split())}") from None
    inside = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    matching = [path for path in inside if fnmatchcase(path.relative_to(folder).as_posix(), found["pattern"])]
    if not matching:
        raise FileNotFoundError(
            f"{name} names no file of that data set: look at {constants.ENDPOINT}/datasets/{found['repository']}"
        )
    return matching
