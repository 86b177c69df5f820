"""Weights in and out of safetensors files, in the layout of the published checkpoints; nothing is ever unpickled."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.kernels.nf4_state import STATE, SUFFIXES, from_bitsandbytes, to_bitsandbytes
from minilora.kernels.nf4_tensor import NF4Tensor
from minilora.phi3.config import Phi3Config
from minilora.phi3.hub import fetch
from minilora.phi3.model import Phi3ForCausalLM
from minilora.phi3.quantization import make_config, quantized_weights
from minilora.phi3.tokenizer import copy_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that weights may have


def load(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    quantize: Literal["nf4"] | None = None,
    quantize_head: bool = False,
) -> Phi3ForCausalLM:
    """Builds the decoder that config.json describes and streams its weights into place, in eval mode.

    Files are memory-mapped; peak memory is the model plus one tensor. With quantize the weights of the layers' projections
    become 4-bit as they stream in (kernels.nf4_tensor), found from what is stored, whatever the dtype; embedding, norms and head
    stay as they are. A checkpoint that is 4-bit already, as save and transformers write it, is read bit for bit.

    Args:
        path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json; or the id of such a
            repository on the hub (see hub.fetch, whose errors are raised too).
        dtype: of the loaded weights, and so of all products, those with 4-bit weights too; each tensor's own when None.
        device: where they go.
        revision: branch, tag or commit of a repository on the hub.
        quantize: "nf4" for 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, "QLoRA").
        quantize_head: quantises the head too.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: config or weights do not fit (every missing, extra, misshapen or mistyped tensor is named), or quantize is
            neither "nf4" nor None, or the head to quantise is the embedding.
    """
    if quantize not in (None, "nf4") or (quantize_head and not quantize):
        raise ValueError(f'quantize must be "nf4" or None, and "nf4" with quantize_head, not {quantize!r}')
    folder = fetch(path, revision)
    config = Phi3Config.read(folder / "config.json")
    if quantize_head and config.tie_word_embeddings:
        raise ValueError("quantize_head needs a head of its own, and this one is the embedding, which is looked up row by row")
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    checkpoint, linear = Checkpoint(folder), linear_layers(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    checkpoint.check(shapes, may_be_4_bit={f"{path}.weight" for path in linear} & shapes.keys())
    rounded = {f"{path}.weight" for path, layer in linear.items() if layer is not model.lm_head or quantize_head}
    for name in shapes:
        stored = weight = checkpoint.weight(name)
        if quantize and name in rounded and not isinstance(stored, NF4Tensor):
            weight = NF4Tensor.quantize(stored.to(device))
        weight = weight.to(dtype=dtype, device=device, copy=weight is stored)  # what is stored lies in the file's pages
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=not isinstance(weight, NF4Tensor)))
    model.tie_weights()
    return model.eval()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


class Checkpoint:
    """The safetensors files of a checkpoint as one table of tensors, of which one at a time is in memory.

    Args:
        path, revision: as in load.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are truncated, pickled or outside the folder.
    """

    def __init__(self, path: Path | str, revision: str | None = None):
        self.folder, self.home = fetch(path, revision), {}  # name → file
        for file in _weight_files(self.folder):
            with _open(file) as opened:
                self.home |= dict.fromkeys(opened.keys(), file)

    def tensor(self, name: str) -> Tensor:
        """As stored; a KeyError where there is none."""
        with _open(self.home[name]) as opened:  # anew for each, or the pages of the whole file stay in memory beside the model
            return opened.get_tensor(name)

    def weight(self, name: str) -> Tensor:
        """As stored, plain or 4-bit."""
        if not self.is_4_bit(name):
            return self.tensor(name)
        return from_bitsandbytes({part: self.tensor(part) for part in self.parts(name) if part in self.home}, name)

    def is_4_bit(self, name: str) -> bool:
        return f"{name}.{STATE}" in self.home

    def parts(self, name: str) -> list[str]:
        """The names of the tensors that a weight is stored as."""
        return [name, *(f"{name}.{suffix}" for suffix in SUFFIXES if self.is_4_bit(name))]

    def check(self, expected: dict[str, torch.Size], may_be_4_bit: set[str]) -> None:
        """Raises ValueError unless there are weights of these names and shapes, and no others."""
        known = {part for name in expected for part in self.parts(name)}
        faults = [f"{name} is missing" for name in expected.keys() - self.home.keys()]
        faults += [f"{name} in {self.home[name].name} is not part of this model" for name in self.home.keys() - known]
        for name in expected.keys() & self.home.keys():
            try:
                shape, dtype = self._kind(name)
            except ValueError as error:
                faults.append(str(error))
                continue
            if self.is_4_bit(name) and name not in may_be_4_bit:
                faults.append(f"{name} is 4-bit, which only the weights of linear layers may be")
            if shape != list(expected[name]):
                faults.append(f"{name} must have shape {list(expected[name])}, not {shape}")
            if dtype not in FLOATING:
                faults.append(f"{name} must be one of {', '.join(sorted(FLOATING))}, not {dtype}")
        if faults:
            raise ValueError(f"the weights in {self.folder} do not fit its config.json:\n  " + "\n  ".join(sorted(faults)))

    def _kind(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype of a weight; a plain one is not read for them."""
        if self.is_4_bit(name):
            return list(self.weight(name).shape), "F32"  # any floating one: from_bitsandbytes has seen to it
        with _open(self.home[name]) as opened:
            stored = opened.get_slice(name)
            return stored.get_shape(), stored.get_dtype()


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Shard names come from an untrusted file: they must stay inside the folder."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles)}): unpickling runs code from the file, so it is "
                "never done here. Convert them to safetensors, or get the checkpoint's safetensors files"
            )
        raise FileNotFoundError(f"{folder} must hold {SINGLE}, or {INDEX} with its shards")
    try:
        names = sorted(set(map(os.fspath, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} must be JSON with a "weight_map" of tensor names to file names: {error!r}') from None
    faults = []
    for name in names:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            faults.append(f"{name!r} is not the plain name of a safetensors file in that folder")
        elif not (folder / name).is_file():
            faults.append(f"{name!r} does not exist")
    if faults:
        raise ValueError(f"{index} names shards that cannot be read: " + "; ".join(faults))
    return [folder / name for name in names]


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}): download or copy it again") from None


def save(
    model: Phi3ForCausalLM, path: Path | str, tokenizer_from: Path | str | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the model as a new folder that transformers, vLLM and llama.cpp load; tied weights are written once.

    4-bit weights are written as such, in bitsandbytes' format, which transformers and vLLM load. The folder appears whole or not
    at all: it is written beside under a temporary name and renamed.

    Args:
        tokenizer_from: a checkpoint whose tokenizer files are carried along.
        shard_bytes: weights of more bytes are split into shards of at most so many (one tensor at least), with an index.

    Raises:
        FileExistsError: the folder is there and not empty.
        FileNotFoundError: there is no folder tokenizer_from.
        ValueError: adapters are not merged, or the head is not tied as the config says: they would be lost.
    """
    folder = Path(path)
    unmerged = [name for name, module in model.named_modules() if getattr(module, "merged", True) is False]
    if tokenizer_from and not Path(tokenizer_from).is_dir():
        raise FileNotFoundError(f"{tokenizer_from} must be a folder that holds tokenizer files")
    if unmerged:
        raise ValueError(f"merge the adapters first, or they would be lost: {', '.join(unmerged)}")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            "the head has a weight of its own, which a config with tie_word_embeddings would lose: set that to false"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be new or empty: it holds files that would be mixed with the model's")
    with torch.device("meta"):
        names = [name for name, _ in Phi3ForCausalLM(model.config).named_parameters()]
    state = model.state_dict()
    quantized, tensors = quantized_weights(model), {}
    for name in names:
        tensors |= to_bitsandbytes(state[name], name) if name in quantized else {name: state[name]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".", ignore_cleanup_errors=True) as beside:
        new = Path(beside) / folder.name
        new.mkdir()
        plain = [path for path in linear_layers(model) if f"{path}.weight" not in quantized]
        quantization = make_config(state[names[0]].dtype, plain) if quantized else None
        model.config.write(new / "config.json", str(state[names[0]].dtype).removeprefix("torch."), quantization)
        try:
            _save_tensors(tensors, new, shard_bytes)
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written ({error}); nothing was left behind") from None
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, new)
        os.replace(new, folder)


def _save_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One file, or shards with their index."""
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, shard_bytes)
    if len(shards) > 1:
        write_index(shards, sum(tensor.nbytes for tensor in tensors.values()), folder)
    for file, names in shards.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors writes files that only their owner reads


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors, of these sizes in bytes, go into which file, in their order and under the published names."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_index(shards: dict[str, list[str]], total_bytes: int, folder: Path) -> None:
    """Writes model.safetensors.index.json, which says where each tensor is."""
    home = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": home}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
