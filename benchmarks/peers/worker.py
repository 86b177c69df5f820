"""One library in a process of its own: requests come as lines of JSON on stdin, and each is answered by one on stdout.

    python worker.py MODULE        MODULE is the library's module in this folder

Once the library is imported it says what CPU time the process has taken; from then on it takes {"do": NAME, …} with a method of
Worker and its arguments, and answers with what that returns, or with {"error": …}.
"""

import contextlib
import csv
import ctypes
import gc
import importlib
import json
import os
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
OF_VENV = {"pip", "setuptools"}  # what an empty environment has


class Worker:
    """A library's model, its optimizer and its batch."""

    def __init__(self, module: str):
        self.library = importlib.import_module(module)
        import torch  # here, so that its import is in the library's time

        self.torch = torch

    def load(self, folder: str, start: str, r: int, alpha: float, dropout: float, seed: int) -> dict:
        """Builds the model of a checkpoint folder, and starts its adapters from the file that has the batch too."""
        from safetensors.torch import load_file
        from side import Settings, read_config

        self.model = self.adapters = self.optimizer = self.floor_ = None  # an earlier one's memory is free before
        self.torch.manual_seed(seed)
        self.r, self.config, self.start = r, read_config(folder), load_file(start)
        self.ids = self.start["input_ids"]
        self.model = self.library.build(folder, self.config, Settings(r, alpha, dropout))
        self.adapters = self.library.adapters(self.model, self.config)
        if len(self.adapters) * 2 != len(self.start) - 1:
            raise ValueError(f"{len(self.adapters)} projections have adapters, not {len(self.start) // 2}")
        for path, adapter in self.adapters.items():
            adapter.set(self.start[f"{path}.lora_A"], self.start[f"{path}.lora_B"])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trained, lr=1e-4)
        for parameter in self.model.parameters():
            parameter.detach().sum()  # reads every page of it, in case it is a mapped file
        return {"trained": sum(p.numel() for p in trained), "bytes_loaded": sum(p.nbytes for p in self.model.parameters())}

    def first_step(self, to: str) -> dict:
        """A step: its loss, and by how many bytes the process grew in it; the gradients go to a file, named as their start."""
        held = _hold()
        loss = self._find_gradients()
        self._write_gradients(to)
        self._update()
        return {"loss": loss, "bytes_of_step": _peak() - held}

    def step(self) -> dict:
        """One step of AdamW: its wall and CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._find_gradients()
        self._update()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def _find_gradients(self) -> float:
        loss = self.library.loss(self.model, self.ids)
        loss.backward()
        return loss.item()

    def _write_gradients(self, to: str) -> None:
        from safetensors.torch import save_file

        gradients = {}
        for path, adapter in self.adapters.items():
            of_A, of_B = adapter.gradients(self.r)
            gradients |= {f"{path}.lora_A": of_A.contiguous(), f"{path}.lora_B": of_B.contiguous()}
        save_file(gradients, to)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def floor(self) -> dict:
        """Wall and CPU seconds of the frozen products alone."""
        from floor import Floor

        self.floor_ = self.floor_ or Floor(self.config, *self.ids.shape)
        wall, cpu = self.floor_.seconds()
        return {"wall": wall, "cpu": cpu}

    def installed(self, names: list[str]) -> dict:
        """How many distributions this environment has, the bytes of their files, and the versions of those named."""
        found = {d.name.lower(): d for d in distributions() if d.name.lower() not in OF_VENV}
        total = 0
        for d in found.values():
            site = str(d.locate_file(""))
            for path, *_ in csv.reader((d.read_text("RECORD") or "").splitlines()):
                with contextlib.suppress(FileNotFoundError):  # compiled files may be gone
                    total += os.stat(os.path.join(site, path)).st_size
        versions = {name: found[name].version for name in names}
        return {"distributions": len(found), "bytes_installed": total, "versions": versions}


def _hold() -> int:
    """Gives free memory back to the system and starts the count of the peak anew; the bytes that are held then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    worker = Worker(sys.argv[1])
    answer({"cpu": time.process_time()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(getattr(worker, request.pop("do"))(**request))
        except Exception as error:  # told to whoever asked, with the trace in the log
            sys.excepthook(*sys.exc_info())
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
