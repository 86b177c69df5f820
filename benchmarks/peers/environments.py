"""The libraries that are measured, and a virtual environment for each under a cache folder."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.protocol import ROOT
from minilora.demo import weights as demo_weights

SOURCES = ("minilora", "kernels", "phi3", "setup.py", "README.md")  # what pip needs to install ours


class Library(NamedTuple):
    """A library as the tables name it, and what pip is asked for; what those need in turn is as pip finds it on the day."""

    name: str
    requirements: list[str]

    @property
    def distributions(self) -> list[str]:
        """The names of the requirements."""
        return [requirement.partition("==")[0].strip("{}") for requirement in self.requirements]


TORCH = ["torch==2.13.0", "safetensors==0.8.0"]  # safetensors holds the weights
TRITON = "triton==3.7.1"  # the one that torch 2.13.0 with CUDA asks for, as constraints.txt has it; newer ones are larger
LIBRARIES = {  # by their modules in this folder
    "ours": Library("minilora", [*TORCH, TRITON, "{minilora}"]),
    "loralib_layers": Library("loralib layers", [*TORCH, "numpy==2.4.6", "loralib==0.1.2"]),  # safetensors writes with numpy
    "transformers_peft": Library("transformers + peft", [*TORCH, "transformers==5.23.0", "peft==0.21.2"]),
    "litgpt_lora": Library("litgpt", [*TORCH, "litgpt==0.5.13"]),
    "torchtune_lora": Library("torchtune", [*TORCH, "torchtune==0.6.1", "torchao==0.17.0"]),  # imports with none newer
}


def cache_folder() -> Path:
    """`peers` in the cache of the demo's weights."""
    return demo_weights.cache_folder() / "peers"


def environment(module: str) -> Path:
    """The Python of a library's environment, which is made, or made anew when it was made for something else.

    Raises:
        RuntimeError: pip could not install it; its last words say why.
    """
    folder = cache_folder() / "environments" / module
    python, stamp, wanted = folder / "bin" / "python", folder / "made_for", _wanted(module)
    made = stamp.read_text().split() if stamp.exists() else [None, None]
    if made == wanted:
        return python
    print(f"making the environment of {LIBRARIES[module].name} in {folder}", flush=True)
    if made[0] != wanted[0]:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    with tempfile.TemporaryDirectory() as copy:
        for name in SOURCES:  # copied, since building in place would leave files in the repository
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, Path(copy, name))
        requirements = [requirement.format(minilora=copy) for requirement in LIBRARIES[module].requirements]
        command = [python, "-m", "pip", "install", "-q", *requirements]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(f"pip: {'; '.join(errors) or last_line(done.stderr)}")
    stamp.write_text(" ".join(wanted))
    return python


def _wanted(module: str) -> list[str]:
    """What an environment is made for, as digests: of Python and the requirements, and for ours of every source file."""
    requirements = [sys.version, *LIBRARIES[module].requirements]
    files = [file for name in SOURCES for file in (ROOT / name, *sorted((ROOT / name).rglob("*.py"))) if file.is_file()]
    sources = [file.read_text(encoding="utf-8") for file in files] if module == "ours" else []
    return [hashlib.sha256("\0".join(texts).encode()).hexdigest() for texts in (requirements, sources)]


def last_line(text: str) -> str:
    """The last line that says something, which in a trace is the error."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason was given")
