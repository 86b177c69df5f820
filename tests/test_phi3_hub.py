"""Names of checkpoints: folders, and ids on a hub that serves on loopback and misbehaves as told; the client is the real one."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api  # before the constants are replaced, which it reads as it is imported
import pytest
import torch
from helpers import CHATML
from safetensors.torch import load, save

import minilora as lora
from minilora import phi3
from minilora.cli import main

ID, COMMIT, EARLIER = "microsoft/Phi-3-tiny", "c" * 40, "e" * 40
UNWANTED = ["README.md", "pytorch_model.bin", "modeling_phi3.py", "tokenizer.model", "onnx/config.json", "old/model.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub(ThreadingHTTPServer):
    """As much of a model hub as the client asks for; what it was asked is kept in `asked`."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits = {"main": COMMIT, COMMIT: COMMIT, "v1": EARLIER, EARLIER: EARLIER}  # revision → commit
        self.files, self.asked = files, []  # path → content; (method, path, Range)
        self.gated, self.token, self.expired_token = (
            False,
            None,
            None,
        )  # whether it is gated; the token it asks for; one it refuses
        self.cuts: dict[str, int] = {}  # path → bytes after which the connection of its next download is cut
        self.down_after_cut = self.down = False  # refuses downloads

    def stop(self):
        self.shutdown()
        self.server_close()

    def downloads(self) -> list[str]:
        return sorted({path.split("/")[-1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path})


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if not path.startswith((f"/api/models/{ID}", f"/{ID}/resolve/")):
            return self.refuse(404, "RepoNotFound")
        if hub.expired_token and self.headers.get("Authorization") == f"Bearer {hub.expired_token}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "RepoNotFound")
        info, tree, file = (
            re.fullmatch(pattern, path)
            for pattern in (f"/api/models/{ID}(?:/revision/(.+))?", f"/api/models/{ID}/tree/(.+)", f"/{ID}/resolve/([^/]+)/(.+)")
        )
        commit = hub.commits.get((info or tree or file)[1] or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if info:
            return self.send({"id": ID, "sha": commit, "siblings": [{"rfilename": name} for name in hub.files]})
        if tree:
            entries = [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in hub.files.items()]
            return self.send(entries)
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        if file[2] not in hub.files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file[2], commit)

    def refuse(self, status: int, code: str, message: str = ""):
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: object):
        self.write(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, commit: str):
        hub, data = self.server, self.server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and hub.down:
            return self.refuse(503, "")
        cut = hub.cuts.pop(name, None) if self.command == "GET" else None
        if cut is not None and hub.down_after_cut:
            hub.down = True
        return self.write(206 if start else 200, data[start:], headers, cut)

    def write(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def files(tiny_checkpoint) -> dict[str, bytes]:
    """The tiny checkpoint in two shards, and more that a repository holds."""
    contents = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    tensors = load(contents.pop("model.safetensors"))
    parts = dict(zip(SHARDS, (dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])), strict=True))
    contents |= {shard: save(part) for shard, part in parts.items()}
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    contents["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    contents["chat_template.jinja"] = CHATML.encode()
    return contents | dict.fromkeys(UNWANTED, b"unwanted")


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub with one repository, to which the client of this process is sent, with an empty cache and no token."""
    server = Hub(dict(files))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.stop()
    thread.join()


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def same_model(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_and_its_tokenizer_load_by_their_id_as_from_a_folder(hub, tiny_checkpoint):
    assert same_model(phi3.load(ID), phi3.load(tiny_checkpoint))
    ours, theirs = phi3.load_tokenizer(ID), phi3.load_tokenizer(tiny_checkpoint)
    assert (ours.encode("é"), ours.stop_ids, ours.render([])) == (theirs.encode("é"), theirs.stop_ids, theirs.render([]))


def test_only_weights_json_and_templates_of_the_top_folder_are_downloaded(hub):
    folder = phi3.fetch(ID)
    assert {path.name for path in folder.iterdir()} == hub.files.keys() - set(UNWANTED)
    assert hub.downloads() == sorted(hub.files.keys() - set(UNWANTED))


def test_a_tokenizer_alone_downloads_no_weights(hub):
    phi3.load_tokenizer(ID)
    assert not set(SHARDS) & set(hub.downloads())


def test_what_is_in_the_cache_is_not_downloaded_again(hub):
    phi3.load_tokenizer(ID)
    hub.asked.clear()
    phi3.load(ID)
    assert hub.downloads() == SHARDS
    hub.asked.clear()
    phi3.load(ID)
    assert hub.downloads() == []


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", EARLIER), (EARLIER, EARLIER)])
def test_the_folder_is_named_after_the_commit_of_the_revision(hub, revision, commit):
    assert phi3.fetch(ID, revision, phi3.TEXT_FILES).name == commit
    assert all(f"/resolve/{commit}/" in path for _, path, _ in hub.asked if "/resolve/" in path)


def test_a_folder_comes_before_the_id_of_the_same_name(hub, tmp_path, monkeypatch):
    (tmp_path / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert phi3.fetch(ID) == Path(ID)
    assert hub.asked == []
    with pytest.raises(ValueError, match=f"^{ID} is a folder here, which has no revision 'v1': leave the revision out$"):
        phi3.fetch(ID, "v1")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./a/b", "../a", "/a", "~/a", "a/b.git", "a b/c", "a--b/c", "C:\\a"])
def test_a_name_that_is_no_folder_and_can_be_no_id_is_told_without_asking_the_hub(hub, name):
    message = f"{name} must be a folder here, or the id of a repository on {hub.url}, owner/name, and is neither"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        phi3.fetch(name)
    assert hub.asked == []


def fails(kind: type[OSError], name: str = ID, revision: str | None = None) -> str:
    """Fetches in vain, and returns the message, one line."""
    with pytest.raises(kind) as raised:
        phi3.fetch(name, revision)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_missing_repository_is_told(hub):
    message = fails(FileNotFoundError, "microsoft/Phi-33")
    assert message.startswith(f"microsoft/Phi-33 is neither a folder here nor a public repository on {hub.url}: check the name")


def test_a_private_repository_opens_with_its_token_only(hub, monkeypatch):
    hub.token = "secret"
    assert "if it is private, log in with `hf auth login`, or set HF_TOKEN" in fails(FileNotFoundError)
    monkeypatch.setenv("HF_TOKEN", "other")
    assert "if it is private" in fails(FileNotFoundError)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert phi3.fetch(ID).name == COMMIT


def test_a_gated_repository_is_told_with_where_to_ask(hub):
    hub.gated = True
    assert fails(PermissionError).startswith(f"{ID} is gated: ask for access at {hub.url}/{ID}, then log in")


def test_a_token_that_the_hub_refuses_is_told(hub, monkeypatch):
    hub.expired_token = "expired"
    monkeypatch.setenv("HF_TOKEN", "expired")
    message = fails(PermissionError)
    assert message.startswith(f"{hub.url} refuses {ID} to this token (")
    assert "Invalid credentials in Authorization header" in message


@pytest.mark.parametrize("revision", ["v2", "d" * 40])
def test_a_missing_revision_is_told(hub, revision):
    message = f"{ID} has no revision '{revision}' on {hub.url}: name a branch, a tag or a commit"
    assert fails(FileNotFoundError, revision=revision) == message


def test_offline_with_nothing_in_the_cache_is_told(hub, offline, tmp_path):
    offline()
    assert fails(FileNotFoundError) == (
        f"{ID} is neither a folder here nor wholly in the cache {tmp_path / 'cache'}, and HF_HUB_OFFLINE forbids to ask {hub.url}"
    )
    assert hub.asked == []


def test_offline_the_cache_serves(hub, offline):
    folder = phi3.fetch(ID)
    hub.asked.clear()
    offline()
    assert phi3.fetch(ID) == folder == phi3.fetch(ID, COMMIT)
    assert hub.asked == []


def test_a_hub_out_of_reach_is_told_and_the_cache_serves(hub, tmp_path):
    folder = phi3.fetch(ID)
    hub.stop()
    assert phi3.fetch(ID) == folder
    message = fails(FileNotFoundError, "microsoft/other")
    assert message.startswith(
        f"microsoft/other is neither a folder here nor wholly in the cache {tmp_path / 'cache'}, and {hub.url}"
    )
    assert "could not be asked (" in message
    assert "refused" in message


def test_a_connection_cut_within_a_file_is_taken_up_where_it_was_cut(hub, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # the client keeps whole chunks only
    hub.cuts = {SHARDS[1]: 1000}
    assert same_model(phi3.load(ID), phi3.load(tiny_checkpoint))
    ranges = [start for method, path, start in hub.asked if method == "GET" and path.endswith(SHARDS[1])]
    assert ranges == [None, "bytes=1000-"]


def test_a_download_that_broke_off_leaves_no_half_file_and_the_next_one_completes_it(hub, tiny_checkpoint, tmp_path):
    phi3.load_tokenizer(ID)
    hub.cuts, hub.down_after_cut = {SHARDS[1]: 1000}, True
    message = fails(ConnectionError)
    assert message.startswith(f"the download of {ID} broke off (")
    assert "503" in message
    assert "only missing files are downloaded" in message
    snapshot = tmp_path / "cache" / "models--microsoft--Phi-3-tiny" / "snapshots" / COMMIT
    assert not (snapshot / SHARDS[1]).exists()
    hub.down = False
    hub.asked.clear()
    assert same_model(phi3.load(ID), phi3.load(tiny_checkpoint))
    assert SHARDS[1] in hub.downloads()
    assert not set(hub.downloads()) - set(SHARDS)


def test_offline_a_half_finished_download_is_told_with_the_missing_shard(hub, offline):
    phi3.load_tokenizer(ID)
    hub.cuts, hub.down_after_cut = {SHARDS[1]: 1000}, True
    fails(ConnectionError)
    offline()
    message = fails(FileNotFoundError)
    assert SHARDS[1] in message
    assert "incomplete" in message


def test_a_shard_that_the_repository_lacks_is_named(hub):
    del hub.files[SHARDS[0]]
    with pytest.raises(ValueError, match=f"names shards that cannot be read: '{SHARDS[0]}' does not exist"):
        phi3.load(ID)


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_file_that_would_leave_the_folder_is_not_asked_for(hub, name):
    hub.files[name] = b"{}"
    phi3.fetch(ID)
    assert not any("evil" in path for _, path, _ in hub.asked)


def minilora(hub, cache, *argv, **environment) -> subprocess.CompletedProcess:
    """Runs the installed command in a process of its own, sent to the hub by the environment as users do."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "minilora", *argv], capture_output=True, text=True, env=os.environ | settings | environment
    )


def test_the_command_line_takes_an_id_tells_its_commit_and_shows_progress(hub, tmp_path):
    argv = ["generate", "--model", ID, "--revision", "v1", "--prompt", "Hi", "--max-new-tokens", "2"]
    result = minilora(hub, tmp_path / "fresh", *argv)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"{ID}, v1: commit {EARLIER}"
    assert "100%" in result.stderr
    again = minilora(hub, tmp_path / "fresh", *argv, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, result.stdout)


def test_a_command_asks_once_which_commit_a_branch_is_so_that_all_files_are_of_the_same(hub, capsys):
    assert main(["generate", "--model", ID, "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{ID}, main branch: commit {COMMIT}\n")
    assert [path for _, path, _ in hub.asked if "/revision/" in path] == [f"/api/models/{ID}/revision/main"]


def test_merge_takes_an_id_and_carries_the_tokenizer_along(hub, tiny_checkpoint, tmp_path, capsys):
    model = lora.inject(phi3.load(tiny_checkpoint), lora.LoraConfig(r=2))
    lora.save_adapter(model, tmp_path / "adapter")
    argv = ["merge", "--model", ID, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert main([str(arg) for arg in argv]) == 0
    assert same_model(phi3.load(tmp_path / "merged"), phi3.load(tiny_checkpoint))  # a fresh adapter adds nothing
    assert phi3.load_tokenizer(tmp_path / "merged").template == CHATML


def test_a_trained_adapter_names_the_id_of_its_base(hub, tmp_path, capsys):
    (tmp_path / "chat.jsonl").write_text('{"instruction": "Hi", "output": "Hello"}\n')
    argv = [
        "train",
        "--model",
        ID,
        "--data",
        tmp_path / "chat.jsonl",
        "--output",
        tmp_path / "out",
        "--set",
        "training.max_steps=1",
    ]
    assert main([str(arg) for arg in argv]) == 0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ID


def test_broken_data_are_told_before_weights_are_downloaded(hub, tmp_path, capsys):
    (tmp_path / "chat.jsonl").write_text("{}")
    assert main(["eval", "--model", ID, "--data", str(tmp_path / "chat.jsonl")]) == 2
    assert not set(SHARDS) & set(hub.downloads())


def test_info_of_an_id_downloads_no_weights(hub, capsys):
    assert main(["info", ID]) == 0
    assert f"{ID}: Phi-3 with" in capsys.readouterr().out
    assert not set(SHARDS) & set(hub.downloads())


def test_the_command_line_tells_a_fault_of_the_hub_in_one_line(hub, tmp_path):
    result = minilora(hub, tmp_path / "fresh", "info", "microsoft/Phi-33", HF_HUB_OFFLINE="1")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("minilora info: microsoft/Phi-33 is neither a folder here nor wholly in the cache")
