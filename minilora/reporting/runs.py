"""A run as its folder holds it, finished or not: log.jsonl, the settings, and the norms of the updates in its newest adapter."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from minilora.adapters.inspection import inspect_adapter
from minilora.training.checkpoint import find_checkpoints
from minilora.training.recorder import SETTINGS


@dataclass(frozen=True)
class Run:
    """What a page shows of a run."""

    name: str
    log: list[dict]
    settings: dict[str, object]  # of training and adapter
    norms: dict[str, float]  # ‖ΔW‖ by the path of the layer; empty before the first save
    norms_of: str = ""  # the adapter's folder

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every line of the log that has this figure."""
        return [(line["step"], line[key]) for line in self.log if line.get(key) is not None]

    @property
    def evaluations(self) -> list[dict]:
        return [line for line in self.log if "eval_loss" in line]

    @property
    def answered(self) -> dict[int, list[dict]]:
        """The samples by the step that they were taken after."""
        return {line["step"]: line["samples"] for line in self.log if line.get("samples")}


def read_run(folder: Path | str) -> Run:
    """Reads a run's output folder; a last line that was not written to its end is left out.

    Raises:
        FileNotFoundError: there is no log.jsonl.
        ValueError: another line is broken.
    """
    folder = Path(folder)
    if not (folder / "log.jsonl").is_file():
        raise FileNotFoundError(f"{folder} must be the output folder of a run, and holds no log.jsonl")
    *lines, _ = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")  # every whole line ends with one
    log = [_parsed(line, f"{folder / 'log.jsonl'}:{number}") for number, line in enumerate(lines, start=1)]
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).exists() else {}
    adapters = [path for path in (folder / "adapter", *reversed(find_checkpoints(folder))) if path.exists()]
    if not adapters:
        return Run(folder.resolve().name, log, settings, {})
    found = inspect_adapter(adapters[0])
    of_adapter = {"r": found.config.r, "lora_alpha": found.config.lora_alpha, "target_modules": found.config.target_modules}
    norms = {path: update.norm for path, update in found.updates.items()}
    return Run(folder.resolve().name, log, of_adapter | settings, norms, adapters[0].name)


def _parsed(line: str, place: str) -> dict:
    try:
        parsed = json.loads(line)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("step"), int):
            raise ValueError("no JSON object with a step")
    except ValueError as error:
        raise ValueError(f"{place} is broken: {error}") from None
    return parsed


def by_module(norms: dict[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Norms by module and number of the layer, and those outside of numbered layers by their paths."""
    modules, outside = {}, {}
    for path, norm in norms.items():
        found = re.search(r"\.(\d+)\.(.+)$", path)
        if found:
            modules.setdefault(found[2], {})[int(found[1])] = norm
        else:
            outside[path] = norm
    return modules, outside


def differing(runs: list[Run]) -> dict[str, list[object]]:
    """The settings that are not alike in all runs, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, "—") for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
