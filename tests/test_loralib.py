"""What loralib's users write runs unchanged but for the import line, and the two libraries read each other's files.

LAYERS, TRAINING and LOADING are the code of the Phi-3 cookbook's chapter on LoRA, which is loralib's own README's; the chapter
leaves the body of the training loop to its reader.
"""

from functools import partial

import loralib
import pytest
import torch
from helpers import rms_error
from torch import nn

import minilora

IMPORT = {loralib: "import loralib as lora", minilora: "import minilora as lora"}

LAYERS = """
import loralib as lora
# Add a pair of low-rank adaptation matrices with rank r=16
layer = lora.Linear(in_features, out_features, r=16)
"""

FUSED = """
import loralib as lora
q_proj = lora.Linear(d_model, d_model, r=8)
k_proj = nn.Linear(d_model, d_model)
v_proj = lora.Linear(d_model, d_model, r=8)
# Alternatively
qkv_proj = lora.MergedLinear(d_model, 3*d_model, r=8, enable_lora=[True, False, True])
"""

TRAINING = """
import loralib as lora
model = BigModel()
# Load the pretrained checkpoint first
model.load_state_dict(torch.load('ckpt_pretrained.pt'), strict=False)
# This sets requires_grad to False for all parameters without the string "lora_" in their names
lora.mark_only_lora_as_trainable(model)
# Training loop
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for batch in dataloader:
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(lora.lora_state_dict(model), checkpoint_path)
"""

LOADING = """
import loralib as lora
model = BigModel()
# Load the pretrained checkpoint first
model.load_state_dict(torch.load('ckpt_pretrained.pt'), strict=False)
# Then load the LoRA checkpoint
model.load_state_dict(torch.load('ckpt_lora.pt'), strict=False)
"""

BIASES = """
import loralib as lora
model = BigModel()
lora.mark_only_lora_as_trainable(model, bias='all')
torch.save(lora.lora_state_dict(model, bias='all'), checkpoint_path)
lora.mark_only_lora_as_trainable(model, bias='lora_only')
torch.save(lora.lora_state_dict(model, bias='lora_only'), checkpoint_path)
"""

# Constructor calls as in the examples beside loralib: GPT-2, RoBERTa and DeBERTa, a convolution.
EXAMPLES = """
import loralib as lora
c_attn = lora.MergedLinear(
    nx, n_state * 3, r=lora_attn_dim, lora_alpha=lora_attn_alpha, lora_dropout=lora_dropout,
    enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False
)
query = lora.Linear(d_model, d_model, lora_r, lora_alpha=lora_alpha)
in_proj = lora.MergedLinear(
    d_model, 3 * d_model, r=lora_r, lora_alpha=lora_alpha, enable_lora=[True, False, True], bias=False
)
plain = lora.Linear(d_model, d_model)
embed = lora.Embedding(vocab_size, d_model, r=lora_r)
conv = lora.Conv2d(3, 8, kernel_size=3, r=lora_r, stride=2, padding=1, bias=False)
layers = [c_attn, query, in_proj, plain, embed, conv]
"""

NUMBERS = {"in_features": 20, "out_features": 12, "d_model": 16, "vocab_size": 10, "nx": 12, "n_state": 12}
SETTINGS = {"lora_attn_dim": 4, "lora_attn_alpha": 32, "lora_dropout": 0.1, "lora_r": 4, "lora_alpha": 16}
IDS = torch.arange(10).view(2, 5)


class BigModel(nn.Module):
    """Embedding, fused projection and head, of the classes that a library has; plain layers without one."""

    def __init__(self, lora=None):
        super().__init__()
        if lora is None:
            self.embed, self.qkv_proj, self.head = nn.Embedding(10, 16), nn.Linear(16, 48), nn.Linear(16, 10)
        else:
            self.embed = lora.Embedding(10, 16, r=2)
            self.qkv_proj = lora.MergedLinear(16, 48, r=4, enable_lora=[True, False, True])
            self.head = lora.Linear(16, 10, r=4)

    def forward(self, ids):
        q, k, v = self.qkv_proj(self.embed(ids)).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v))


def run(block: str, library, **names) -> dict:
    """The names that a block leaves behind, run with its import line for that library."""
    assert block.count(IMPORT[loralib]) == 1
    names = NUMBERS | SETTINGS | {"nn": nn, "torch": torch, "BigModel": partial(BigModel, library)} | names
    exec(block.replace(IMPORT[loralib], IMPORT[library]), names)
    assert names["lora"] is library
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(BigModel().state_dict(), "ckpt_pretrained.pt")
    return tmp_path


def shapes(module) -> dict[str, tuple]:
    return {name.replace("conv.", ""): (tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()}


@pytest.mark.parametrize("block", [LAYERS, FUSED, EXAMPLES], ids=["layers", "fused", "examples"])
def test_layers_are_made_as_in_loralib(block):
    ours, theirs = run(block, minilora), run(block, loralib)
    names = [name for name, value in theirs.items() if isinstance(value, nn.Module)]
    assert names
    for name in names:
        assert shapes(ours[name]) == shapes(theirs[name]), name


@pytest.mark.parametrize("writer", [loralib, minilora])
def test_a_model_trained_with_one_library_is_loaded_with_the_other(writer):
    trained = run(TRAINING, writer, dataloader=[IDS] * 8, checkpoint_path="ckpt_lora.pt")["model"]
    assert trained(IDS).square().mean() < 0.9 * BigModel.forward(base(), IDS).square().mean()
    for reader in (loralib, minilora):
        model = run(LOADING, reader)["model"]
        assert rms_error(model(IDS), trained(IDS)) < 1e-6


def base():
    model = BigModel()
    model.load_state_dict(torch.load("ckpt_pretrained.pt"))
    return model


def test_training_takes_the_same_steps_as_with_loralib():
    """From the same start: the two draw their random numbers in another order."""
    start = BigModel(loralib).state_dict()

    class Started(BigModel):
        def __init__(self, lora):
            super().__init__(lora)
            self.load_state_dict(start)

    files = {}
    for library in (loralib, minilora):
        run(TRAINING, library, BigModel=partial(Started, library), dataloader=[IDS] * 8, checkpoint_path="ckpt_lora.pt")
        files[library] = torch.load("ckpt_lora.pt")
    assert files[minilora].keys() == files[loralib].keys()
    for name, tensor in files[loralib].items():
        assert rms_error(files[minilora][name], tensor) < 1e-4, name
        assert rms_error(start[name], tensor) > 1e-3, name


def test_biases_are_chosen_and_saved_as_in_loralib():
    found = {}
    for library in (loralib, minilora):
        model = run(BIASES, library, checkpoint_path="ckpt_lora.pt")["model"]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        found[library] = trained, torch.load("ckpt_lora.pt").keys()
    assert found[minilora] == found[loralib]


def test_every_public_name_of_loralib_that_its_readers_use_is_here():
    for name in ("Linear", "Embedding", "MergedLinear", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"):
        assert hasattr(loralib, name)
        assert issubclass(getattr(minilora, name), minilora.LoRALayer)
    for name in ("mark_only_lora_as_trainable", "lora_state_dict"):
        assert callable(getattr(minilora, name))
