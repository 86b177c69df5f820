"""Names of data: files, weights, and files of data sets on a hub that serves on loopback; the client is the real one."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub.constants
import huggingface_hub.hf_api  # before the constants are replaced, which it reads as it is imported
import pytest

from minilora.data.sources import Source, files, parse_source, read_source

ID, COMMIT, PARQUET = "someone/talks", "c" * 40, "d" * 40
COMMITS = {"main": COMMIT, COMMIT: COMMIT, "refs/convert/parquet": PARQUET, PARQUET: PARQUET}


def line(text: str) -> bytes:
    return json.dumps({"instruction": text, "output": "yes"}).encode() + b"\n"


FILES = {
    "data/train-0.jsonl": line("a") + line("b"), "data/train-1.jsonl": line("c"), "data/test-0.jsonl": line("d"),
    "README.md": b"no data", "talks.py": b"raise SystemExit",
}  # fmt: skip


class Answer(BaseHTTPRequestHandler):
    """As much of a hub of data sets as the client asks for; what is downloaded is kept in `server.downloads`."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        revisions = "|".join(COMMITS)
        info = re.fullmatch(rf"/api/datasets/{ID}(?:/revision/({revisions}))?", path)
        tree = re.fullmatch(rf"/api/datasets/{ID}/tree/({revisions})", path)
        file = re.fullmatch(rf"/datasets/{ID}/resolve/({revisions})/(.+)", path)
        if info:
            return self.send({"id": ID, "sha": COMMITS[info[1] or "main"], "siblings": [{"rfilename": name} for name in FILES]})
        if tree:
            return self.send([{"type": "file", "path": name, "size": len(d), "oid": etag(d)} for name, d in FILES.items()])
        if file:
            if self.command == "GET":
                self.server.downloads.append(file[2])
            data = FILES[file[2]]
            return self.write(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMITS[file[1]]})
        return self.write(
            404, b"", {"X-Error-Code": "RevisionNotFound" if path.startswith(f"/api/datasets/{ID}") else "RepoNotFound"}
        )

    def send(self, content: object):
        self.write(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def write(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, to which the client of this process is sent, with an empty cache and no token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.downloads, url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def questions(name) -> list[str]:
    return [conversation.messages[0]["content"] for conversation in read_source(Source(name))]


# Names and weights


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("chat.jsonl", Source("chat.jsonl", 1.0)),
        ("chat.jsonl=0.3", Source("chat.jsonl", 0.3)),
        ("a=b.jsonl=2", Source("a=b.jsonl", 2.0)),
        ("hf://datasets/a/b/*.jsonl=1e-1", Source("hf://datasets/a/b/*.jsonl", 0.1)),
    ],
)
def test_a_source_is_a_name_and_a_weight(text, source):
    assert parse_source(text) == source


def test_a_file_whose_name_looks_like_a_weight_is_that_file(tmp_path):
    path = tmp_path / "run=3"
    path.write_bytes(line("a"))
    assert parse_source(str(path)) == Source(str(path), 1.0)
    assert parse_source(f"{path}=2") == Source(str(path), 2.0)


@pytest.mark.parametrize("weight", ["", "x", "0", "-1", "inf", "nan", "0.3.jsonl"])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl={weight}: what follows = is the weight, and must be a positive")):
        parse_source(f"a.jsonl={weight}")


# The hub


def test_matching_files_of_a_data_set_are_read_in_the_order_of_their_names(hub):
    assert questions(f"hf://datasets/{ID}/data/train-*.jsonl") == ["a", "b", "c"]
    assert sorted(hub.downloads) == ["data/train-0.jsonl", "data/train-1.jsonl"]


def test_what_is_in_the_cache_is_neither_downloaded_again_nor_read_for_another_name(hub):
    files(f"hf://datasets/{ID}/*.jsonl")
    hub.downloads.clear()
    assert questions(f"hf://datasets/{ID}/data/test-0.jsonl") == ["d"]
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("revision", "commit"), [("", COMMIT), ("@main", COMMIT), ("@refs%2Fconvert%2Fparquet", PARQUET), ("@~parquet", PARQUET)]
)
def test_a_revision_may_be_named(hub, revision, commit):
    (file,) = files(f"hf://datasets/{ID}{revision}/data/test-0.jsonl")
    assert commit in file.parts


@pytest.mark.parametrize(
    "name", ["hf://datasets/someone", "hf://datasets/someone/talks", f"hf://models/{ID}/a.jsonl", "hf://x/../y"]
)
def test_another_spelling_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be hf://datasets/OWNER/NAME/PATH")):
        files(name)


def test_a_name_that_no_file_matches_is_refused(hub):
    with pytest.raises(FileNotFoundError, match=re.escape("names no file of that data set: look at http://127.0.0.1")):
        files(f"hf://datasets/{ID}/data/valid-*.jsonl")


@pytest.mark.parametrize("name", ["someone/nothing", f"{ID}@nowhere"])
def test_what_the_hub_does_not_have_is_told_in_one_line(hub, name):
    with pytest.raises(ConnectionError, match=re.escape(f"hf://datasets/{name}/a.jsonl could not be had from http")) as refused:
        files(f"hf://datasets/{name}/a.jsonl")
    assert "\n" not in str(refused.value)


def test_a_hub_out_of_reach_is_told(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="could not be had from http"):
        files(f"hf://datasets/{ID}/a.jsonl")
