"""Files that are whole or absent, whatever ends the program or the machine: written beside, flushed to the disk, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """$MINILORA_CACHE, else minilora in the user's cache folder."""
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINILORA_CACHE") or Path(users, "minilora"))


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file; a failure on the way leaves the earlier one untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which then takes the place of `path`; a failure on the way leaves the earlier one there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        yield new
        for written in (*new.rglob("*"), new):
            _flush(written)
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        except BaseException:  # an interrupt between the two renames too
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder whole or not at all: who is killed on the way leaves none of that name behind."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as beside:
        os.replace(path, Path(beside, "old"))


def remove_leftovers(folder: Path, name: str) -> None:
    """Removes what killed programs left in a folder while they wrote, replaced or removed files and folders of that name.

    Args:
        name: as in Path.glob.
    """
    for beside in folder.glob(f"{name}.*"):
        if beside.is_dir() and {path.name.partition(".")[0] for path in beside.iterdir()} <= {"new", "old"}:
            shutil.rmtree(beside)
        elif beside.suffix == ".tmp":
            beside.unlink()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: a rename alone may outlive what it renames."""
    if os.name == "nt":
        return  # Windows opens no folder, and flushes no file that is open for reading
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
