import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.files import cache_folder, remove_folder, remove_leftovers, replaced_folder, write_file


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def usual_umask():
    earlier = os.umask(0o022)
    yield
    os.umask(earlier)


@pytest.fixture
def folder(tmp_path) -> Path:
    """An earlier folder, alone in its parent."""
    folder = tmp_path / "parent" / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("earlier")
    (folder / "sub" / "b").write_text("earlier too")
    return folder


def assert_only_the_earlier_one_is_there(folder):
    assert contents(folder.parent) == {"out/a": b"earlier", "out/sub/b": b"earlier too"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ours"
    monkeypatch.delenv("MINILORA_CACHE")
    assert cache_folder() == tmp_path / "minilora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "minilora"


# write_file


@pytest.mark.parametrize("content", ["naïve 日本\r\n", b"\x00\xff\r\n", ""])
def test_a_file_holds_what_was_written(tmp_path, content):
    write_file(tmp_path / "new" / "deep" / "file", content)
    assert contents(tmp_path) == {"new/deep/file": content if isinstance(content, bytes) else content.encode("utf-8")}


def test_a_file_is_replaced(tmp_path):
    write_file(tmp_path / "file", "a longer earlier one")
    write_file(tmp_path / "file", "later")
    assert contents(tmp_path) == {"file": b"later"}


def test_who_reads_a_file_while_it_is_replaced_reads_the_earlier_one_whole(folder):
    with open(folder / "a") as reader:
        write_file(folder / "a", "later")
        assert reader.read() == "earlier"
    assert (folder / "a").read_text() == "later"


def test_a_new_file_has_the_usual_permissions(tmp_path, usual_umask):
    write_file(tmp_path / "file", "x")
    assert mode(tmp_path / "file") == "0o644"


def test_a_file_that_cannot_be_replaced_leaves_no_other_behind(folder):
    with pytest.raises(OSError, match="out"):
        write_file(folder, "a folder is in the way")
    assert_only_the_earlier_one_is_there(folder)


def test_a_text_that_cannot_be_encoded_leaves_the_earlier_file_whole(folder):
    with pytest.raises(UnicodeEncodeError):
        write_file(folder / "a", "\ud800")
    assert_only_the_earlier_one_is_there(folder)


FULL_DISK = """
import resource, sys
from pathlib import Path
from minilora.files import write_file

resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # no file may grow longer
try:
    write_file(Path(sys.argv[1]), "x" * 1000)
except OSError as error:
    print("OSError")
"""


def test_a_disk_that_fills_leaves_the_earlier_file_whole(folder):
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder / "a")], capture_output=True, text=True, check=True)
    assert ended.stdout == "OSError\n"
    assert_only_the_earlier_one_is_there(folder)


# replaced_folder


def test_a_new_folder_takes_the_place_of_the_earlier_one(folder):
    with replaced_folder(folder) as new:
        assert not list(new.iterdir())
        (new / "c").write_text("later")
        assert (folder / "a").read_text() == "earlier"  # until the end
    assert contents(folder.parent) == {"out/c": b"later"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_folder_is_made_where_there_was_none(tmp_path):
    with replaced_folder(tmp_path / "new" / "deep") as new:
        (new / "c").write_text("later")
    assert contents(tmp_path) == {"new/deep/c": b"later"}


def fill_by_half(folder: Path, failure: type[BaseException]) -> None:
    with replaced_folder(folder) as new:
        (new / "a").write_text("half")
        raise failure("half")


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_while_filling_leaves_the_earlier_folder_whole(folder, failure):
    with pytest.raises(failure, match="half"):
        fill_by_half(folder, failure)
    assert_only_the_earlier_one_is_there(folder)


def test_a_failure_while_filling_a_new_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="half"):
        fill_by_half(tmp_path / "out", ValueError)
    assert not list(tmp_path.iterdir())


def test_a_failure_of_the_last_rename_leaves_the_earlier_folder_whole(folder):
    with pytest.raises(OSError, match="No such file"), replaced_folder(folder) as new:
        shutil.rmtree(new)  # nothing is left to be renamed
    assert_only_the_earlier_one_is_there(folder)


KILLED = """
import os, sys
from pathlib import Path
from minilora.files import replaced_folder

with replaced_folder(Path(sys.argv[1])) as new:
    (new / "a").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_a_process_killed_while_filling_leaves_the_earlier_folder_whole(folder):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert ended.returncode == -9
    assert contents(folder) == {"a": b"earlier", "sub/b": b"earlier too"}


def test_a_new_folder_has_the_usual_permissions(folder, usual_umask):
    for path in (folder, folder.parent / "new"):
        with replaced_folder(path) as new:
            (new / "c").write_text("later")
        assert mode(path) == "0o755"
        assert mode(path / "c") == "0o644"


# remove_folder and remove_leftovers


def test_a_folder_is_removed_and_nothing_else(folder):
    (folder.parent / "out.txt").write_text("stays")
    remove_folder(folder)
    assert contents(folder.parent) == {"out.txt": b"stays"}
    assert [path.name for path in folder.parent.iterdir()] == ["out.txt"]


KILLED_WRITING = """
import os, sys
from pathlib import Path
from minilora.files import cache_folder, remove_folder, replaced_folder, write_file

do, target, last = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
sys.addaudithook(lambda event, _: os.kill(os.getpid(), 9) if event == last else None)
if do == "write":
    write_file(target, "later")
elif do == "remove":
    remove_folder(target)
else:
    with replaced_folder(target) as outer, replaced_folder(outer) as inner:
        pass
"""


@pytest.mark.parametrize(("do", "last"), [("write", "os.rename"), ("remove", "os.rmdir"), ("replace", "os.rename")])
def test_what_a_killed_process_leaves_is_removed(folder, do, last):
    target = folder / "a" if do == "write" else folder
    (folder.parent / "out.backup").mkdir()
    (folder.parent / "out.backup" / "mine").write_text("stays")
    ended = subprocess.run([sys.executable, "-c", KILLED_WRITING, do, str(target), last], check=False)
    assert ended.returncode == -9
    assert target.exists() == (do != "remove")
    assert len(list(target.parent.glob(f"{target.name}.*"))) == (1 if do == "write" else 2)
    remove_leftovers(target.parent, target.name[0] + "*")
    left = {"out/a": b"earlier", "out/sub/b": b"earlier too"} if do != "remove" else {}
    assert contents(folder.parent) == left | {"out.backup/mine": b"stays"}
    assert len(list(folder.parent.iterdir())) == (1 if do == "remove" else 2)


@pytest.mark.parametrize("write", ["file", "folder"])
def test_what_is_renamed_was_on_the_disk_before_and_its_name_is_after(folder, monkeypatch, write):
    """Of the calls only: what a machine that loses its power keeps cannot be tried here."""
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(f"→ {Path(new).name}"), replace(old, new)))
    if write == "file":
        write_file(folder / "a", "later")
        assert calls == [f"a.{os.getpid()}.tmp", "→ a", "out"]
        return
    with replaced_folder(folder) as new:
        (new / "c").write_text("later")
    assert calls == ["c", "new", "→ old", "→ out", "parent"]
