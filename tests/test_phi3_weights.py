"""Checkpoints in and out: bit for bit, in the published layout, with every fault named and nothing unpickled."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import load_in_transformers, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora import phi3
from minilora.phi3.weights import plan_shards

FILES = {"config.json", "model.safetensors"}


@pytest.fixture
def folder(tmp_path):
    phi3.save(tiny_model(tiny_config()), tmp_path / "model")
    return tmp_path / "model"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def rewrite(folder, change):
    """Saves the weights again as change(tensors) leaves them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split_into_shards(folder):
    """Two shards and their index, in the published naming, for the one file."""
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    write_index(folder, names)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def assert_same_weights(one, other):
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(one.named_parameters()).keys()
    for name, parameter in one.named_parameters():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_save_then_load_is_bit_exact(tmp_path, dtype, tie):
    model = tiny_model(tiny_config(tie_word_embeddings=tie, original_max_position_embeddings=1024)).to(dtype)
    phi3.save(model, tmp_path / "model")
    loaded = phi3.load(str(tmp_path / "model"))
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_saved_folder_has_the_published_names_and_shapes(tmp_path):
    phi3.save(tiny_model(tiny_config(tie_word_embeddings=True)).bfloat16(), tmp_path / "out" / "model")  # makes parents
    assert names_in(tmp_path / "out") == {"model"}
    assert names_in(tmp_path / "out" / "model") == FILES
    layer = {
        "input_layernorm": [32], "self_attn.qkv_proj": [64, 32], "self_attn.o_proj": [32, 32], "post_attention_layernorm": [32],
        "mlp.gate_up_proj": [96, 32], "mlp.down_proj": [32, 48],
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": [260, 32], "model.norm.weight": [32]}  # no lm_head: it is tied
    with safe_open(tmp_path / "out" / "model" / "model.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == shapes  # noqa: SIM118 (no dict)
        assert file.metadata() == {"format": "pt"}
    raw = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"], raw["torch_dtype"]) == ("phi3", ["Phi3ForCausalLM"], "bfloat16")


def test_saved_files_are_as_readable_as_any_new_file(tmp_path, tiny_tokenizer):
    phi3.save(tiny_model(tiny_config()), tmp_path / "model", tiny_tokenizer, shard_bytes=50_000)
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*(tmp_path / "model").iterdir(), tmp_path / "plain"]}
    assert set(modes.values()) == {modes["plain"]}, modes


@given(st.integers(1, 200_000), st.booleans())
def test_shards_hold_at_most_so_many_bytes_and_load_bit_for_bit(tmp_path_factory, shard_bytes, tie):
    folder, model = tmp_path_factory.mktemp("shards") / "model", tiny_model(tiny_config(tie_word_embeddings=tie))
    phi3.save(model, folder, shard_bytes=shard_bytes)
    assert_same_weights(phi3.load(folder), model)
    sizes = {path.name: [t.nbytes for t in load_file(path).values()] for path in folder.glob("*.safetensors")}
    assert all(sum(tensors) <= shard_bytes or len(tensors) == 1 for tensors in sizes.values())
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(sizes) > 1)
    if index.exists():
        raw = json.loads(index.read_text())
        assert raw["metadata"] == {"total_size": sum(map(sum, sizes.values()))}
        assert raw["weight_map"].keys() == dict(model.named_parameters()).keys()
        assert set(raw["weight_map"].values()) == sizes.keys()
        assert sorted(sizes) == [f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)]


def test_a_shard_is_filled_to_its_last_byte_and_no_further():
    sizes = {"a": 3, "b": 2, "c": 1, "large": 9, "d": 5}
    assert list(plan_shards(sizes, 5).values()) == [["a", "b"], ["c"], ["large"], ["d"]]
    assert plan_shards(sizes, 20) == {"model.safetensors": list(sizes)}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_transformers_reads_shards_bit_for_bit(tmp_path, tie):
    model = tiny_model(tiny_config(tie_word_embeddings=tie)).bfloat16()
    phi3.save(model, tmp_path / "model", shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_same_weights(load_in_transformers(tmp_path / "model", torch.bfloat16), model)


def test_the_tokenizer_is_carried_along(tmp_path, tiny_tokenizer):
    phi3.save(tiny_model(tiny_config()), tmp_path / "model", tokenizer_from=tiny_tokenizer)
    assert names_in(tmp_path / "model") == FILES | names_in(tiny_tokenizer)
    for file in tiny_tokenizer.iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_that_is_nowhere_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere must be a folder that holds tokenizer files$"):
        phi3.save(tiny_model(tiny_config()), tmp_path / "model", tokenizer_from=tmp_path / "nowhere")
    assert names_in(tmp_path) == set()


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path, tiny_tokenizer):
    (tmp_path / "tokenizer" / "tokenizer_config.json").mkdir(parents=True)  # no file to copy
    with pytest.raises(OSError, match=r"tokenizer_config\.json"):
        phi3.save(tiny_model(tiny_config()), tmp_path / "model", tmp_path / "tokenizer")
    assert names_in(tmp_path) == {"tokenizer"}


def test_parameters_that_are_views_are_saved_as_they_read(tmp_path):
    model = tiny_model(tiny_config())
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(torch.randn(64, 32).T[:, ::2])
    assert not projection.weight.is_contiguous()
    phi3.save(model, tmp_path / "model")
    assert_same_weights(phi3.load(tmp_path / "model"), model)


def test_shards_with_an_index_give_the_same_weights(folder):
    whole = phi3.load(folder)
    split_into_shards(folder)
    assert "model.safetensors" not in names_in(folder)
    assert_same_weights(phi3.load(folder), whole)


def test_loading_in_another_dtype_rounds_each_weight_once(folder):
    whole = phi3.load(folder)
    assert_same_weights(phi3.load(folder, dtype=torch.bfloat16), whole.bfloat16())


def test_each_tensor_keeps_its_own_dtype_when_none_is_asked_for(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    model = phi3.load(folder)
    assert (model.lm_head.weight.dtype, model.model.norm.weight.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_weights_go_to_the_device_asked_for(folder, device):
    assert {parameter.device.type for parameter in phi3.load(folder, device=device).parameters()} == {"meta"}
    assert {parameter.device.type for parameter in phi3.load(folder).parameters()} == {"cpu"}


def test_a_loaded_model_outlives_its_files(folder):
    model, file = phi3.load(folder), folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:  # in place: weights that were still mapped would turn to zeros
        opened.write(b"\0" * size)
    assert model.lm_head.weight.count_nonzero() == model.lm_head.weight.numel()


PEAK = """
import sys, threading, torch
from minilora import phi3

def own_memory():  # bytes, without the pages of mapped files, which the system takes back when it needs them
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(own_memory())

phi3.load(sys.argv[1])
seen, done = [own_memory()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = phi3.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
done.set()
watcher.join()
sizes = [p.nbytes for p in model.parameters()]
print(max(seen) - seen[0], sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from Linux' /proc")
def test_loading_takes_the_memory_of_the_model_and_of_one_tensor_at_most(folder, tmp_path):
    config = tiny_config(hidden_size=1024, intermediate_size=2048, num_hidden_layers=5, vocab_size=8000)
    phi3.save(tiny_model(config), tmp_path / "large")
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", PEAK, folder, tmp_path / "large", dtype]
        grown, model, tensor = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert model > 120e6
        assert 0.9 * model < grown < 1.05 * model + tensor, dtype


def test_every_tensor_that_does_not_fit_is_named_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(32, 48)
        tensors["lm_head.weight"] = torch.zeros(32, 260)
        tensors["model.embed_tokens.weight"] = torch.zeros(260, 32, dtype=torch.int8)

    rewrite(folder, change)
    with pytest.raises(ValueError, match="do not fit") as raised:
        phi3.load(folder)
    first, *faults = str(raised.value).splitlines()
    assert first == f"the weights in {folder} do not fit its config.json:"
    assert faults == [
        "  lm_head.weight must have shape [260, 32], not [32, 260]",
        "  model.embed_tokens.weight must be one of BF16, F16, F32, F64, not I8",
        "  model.layers.2.mlp.down_proj.weight in model.safetensors is not part of this model",
        "  model.norm.weight is missing",
    ]


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=re.escape(f"{file} is truncated or not a safetensors file")):
        phi3.load(folder)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../model.safetensors", "is not the plain name of a safetensors file in that folder"),
        ("sub/model.safetensors", "is not the plain name of a safetensors file in that folder"),
        ("/tmp/model.safetensors", "is not the plain name of a safetensors file in that folder"),
        ("..\\model.safetensors", "is not the plain name of a safetensors file in that folder"),
        ("pytorch_model.bin", "is not the plain name of a safetensors file in that folder"),
        ("..", "is not the plain name of a safetensors file in that folder"),
        ("", "is not the plain name of a safetensors file in that folder"),
        ("gone.safetensors", "does not exist"),
    ],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(folder, name, fault):
    for place in (folder.parent, folder / "sub"):
        place.mkdir(exist_ok=True)
        save_file(load_file(folder / "model.safetensors"), place / "model.safetensors")
    split_into_shards(folder)
    index = folder / "model.safetensors.index.json"
    write_index(folder, json.loads(index.read_text())["weight_map"] | {"model.norm.weight": name})
    with pytest.raises(ValueError, match=re.escape(f"{index} names shards that cannot be read: {name!r} {fault}") + "$"):
        phi3.load(folder)


def test_all_unreadable_shards_are_named_at_once(folder):
    write_index(folder, {"a": "../a.safetensors", "b": "b.safetensors", "c": "model.safetensors"})
    with pytest.raises(ValueError, match=r"'../a.safetensors' is not the plain name .*; 'b.safetensors' does not exist$"):
        phi3.load(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": null}', '{"weight_map": {"a": 5}}', "\xff"]
)
def test_an_index_that_cannot_be_read_is_refused(folder, text):
    index = folder / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(index))):
        phi3.load(folder)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_and_never_opened(folder, name):
    torch.save(Bomb(folder / "exploded"), folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder} holds pickled weights only ({name}): unpickling runs code")):
        phi3.load(folder)
    assert "exploded" not in names_in(folder)


def test_safetensors_are_loaded_even_where_pickles_lie_beside(folder):
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert phi3.load(folder).config.hidden_size == 32


def test_what_is_not_there_is_named(folder):
    for missing in (folder / "nowhere", folder / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{missing} must be a folder here, or the id of a")):
            phi3.load(missing)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder} must hold model.safetensors, or model.safetensors.i")):
        phi3.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / "config.json"))):
        phi3.load(folder)


def test_saving_into_an_empty_folder_fills_it(tmp_path):
    (tmp_path / "model").mkdir()
    phi3.save(tiny_model(tiny_config()), tmp_path / "model")
    assert names_in(tmp_path / "model") == FILES


def test_saving_into_a_folder_with_files_is_refused_and_changes_nothing(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(f"{folder} must be new or empty: it holds files that would be mixed")):
        phi3.save(tiny_model(tiny_config(), seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert names_in(folder.parent) == {"model"}


def test_saving_unmerged_adapters_is_refused(tmp_path):
    model = tiny_model(tiny_config())
    layer = model.model.layers[1]
    layer.mlp.down_proj.merged = layer.self_attn.o_proj.merged = False  # the sign by which adapters are known
    with pytest.raises(ValueError, match=r"^merge the adapters first, or they would be lost: ") as raised:
        phi3.save(model, tmp_path / "model")
    assert "model.layers.1.self_attn.o_proj, model.layers.1.mlp.down_proj" in str(raised.value)
    assert names_in(tmp_path) == set()
    layer.mlp.down_proj.merged = layer.self_attn.o_proj.merged = True
    phi3.save(model, tmp_path / "model")


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from helpers import tiny_config, tiny_model
from minilora import phi3

model = tiny_model(tiny_config())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))  # no file may grow past this
try:
    phi3.save(model, sys.argv[2])
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for a full disk by Linux' limit on the size of files")
@pytest.mark.parametrize(
    ("limit", "message"), [(100, ""), (50_000, r"{path} could not be written \(.*\); nothing was left behind")]
)
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, limit, message):
    path = tmp_path / "model"
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), path, os.path.dirname(__file__)], capture_output=True, text=True, check=True
    )
    assert re.match("OSError: " + message.format(path=re.escape(str(path))), result.stdout)
    assert names_in(tmp_path) == set()


def test_a_head_that_is_no_longer_tied_is_not_lost_in_silence(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="the head has a weight of its own, which a config with tie_word_embeddings would lose"):
        phi3.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
