"""Checkpoints by name: a folder here, or a repository on the Hugging Face hub, downloaded once into its cache."""

from collections.abc import Iterable
from pathlib import Path

TEXT_FILES = ("*.json", "*.jinja")  # config, tokenizer, chat template: a few megabytes
CHECKPOINT_FILES = ("*.safetensors", *TEXT_FILES)
TOKEN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


def fetch(source: Path | str, revision: str | None = None, files: Iterable[str] = CHECKPOINT_FILES) -> Path:
    """The folder that a name means: one here if there is one, else the hub's repository of that id, downloaded.

    Files lie in huggingface_hub's cache, whole or not at all; what is there already is not downloaded again. The folder of a
    download is named after its commit.

    Args:
        source: a folder, or an id such as "microsoft/Phi-3-mini-4k-instruct".
        revision: branch, tag or commit of a repository; its main branch when None.
        files: patterns of the names to download; files in subfolders never are.

    Raises:
        FileNotFoundError: there is no such folder, repository or revision, or it is not in the cache and the hub out of reach.
        PermissionError: the hub asks for a token, or for an agreement.
        ConnectionError: the download broke off.
        ValueError: a revision is asked of a folder.
    """
    if not Path(source).is_dir():
        return _download(str(source), revision, list(files))
    if revision is not None:
        raise ValueError(f"{source} is a folder here, which has no revision {revision!r}: leave the revision out")
    return Path(source)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    # Imported here, since they take 0.2 s, and a folder needs none of them.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # the base of whatever the HTTP library underneath raises
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    if not _is_id(name):
        raise FileNotFoundError(f"{name} must be a folder here, or the id of a repository on {hub}, owner/name, and is neither")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
    except GatedRepoError:
        raise PermissionError(f"{name} is gated: ask for access at {hub}/{name}, then {TOKEN_HINT}") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a public repository on {hub}: check the name; if it is private, {TOKEN_HINT}"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on {hub}: name a branch, a tag or a commit") from None
    except LocalEntryNotFoundError as error:
        if hasattr(error, "snapshot_path"):  # half a download is in the cache: the message names the files that are missing
            raise FileNotFoundError(_one_line(error)) from None
        offline = f"HF_HUB_OFFLINE forbids to ask {hub}"
        why = offline if constants.HF_HUB_OFFLINE else f"{hub} could not be asked ({_one_line(error.__cause__ or error)})"
        raise FileNotFoundError(
            f"{name} is neither a folder here nor wholly in the cache {constants.HF_HUB_CACHE}, and {why}"
        ) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(f"{hub} refuses {name} to this token ({_one_line(error)}): {TOKEN_HINT}") from None
        raise ConnectionError(
            f"the download of {name} broke off ({_one_line(error)}): try again, and only missing files are downloaded"
        ) from None


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
