"""A run on disk, to go on from as if it had never ended: `checkpoint-STEP/` in its output folder, in safetensors and JSON.

    adapter_config.json, adapter_model.safetensors   the adapter, which load_adapter, PEFT and the command line read as any other
    training_state.safetensors                       AdamW's moments by parameter
    training_state.json                              the run's fingerprint, schedule, place in the data, steps, tokens and log

A checkpoint is there whole or not at all, and earlier ones are removed after the new one is whole.
"""

import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapters.adapter_files import TENSORS, load_adapter, save_adapter
from minilora.adapters.peft_config import CONFIG
from minilora.adapters.switching import adapters_of
from minilora.files import replaced_folder
from minilora.training.fingerprint import differences

STATE, STATE_TENSORS = "training_state.json", "training_state.safetensors"
KEYS = "fingerprint", "progress", "schedule", "param_groups"  # of the JSON file
FILES = {CONFIG, TENSORS, STATE, STATE_TENSORS}


# Finding and removing


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The place of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints in a folder, by their steps."""
    steps = [int(found[1]) for path in output_dir.glob("checkpoint-*") if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    folders = [checkpoint_folder(output_dir, step) for step in sorted(steps)]
    return [folder for folder in folders if all((folder / name).is_file() for name in FILES)]


def find_resumed(resume: bool | Path | str, output_dir: Path | None) -> Path:
    """The checkpoint to go on from: the one named, or the newest one in output_dir.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume is not True:
        missing = sorted(name for name in FILES if not Path(resume, name).is_file())
        if missing:
            raise FileNotFoundError(f"{resume} must be a checkpoint to resume from, and lacks {', '.join(missing)}")
        return Path(resume)
    if not output_dir:
        raise ValueError("resume=True takes the newest checkpoint in output_dir: name output_dir, or the checkpoint itself")
    found = find_checkpoints(output_dir)
    if not found:
        raise FileNotFoundError(f"nothing to resume: {output_dir} holds no checkpoint. Start the run without resume")
    return found[-1]


# Writing and reading


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer, schedule, fingerprint: dict, progress: dict, base: str | None = None
) -> None:
    """Writes a checkpoint; errors as in save_adapter.

    Args:
        fingerprint: of the run, which load_checkpoint compares.
        progress: whatever else the run is to remember, in types of JSON; load_checkpoint gives it back.
    """
    state = optimizer.state_dict()
    moments = {
        f"optimizer.{name}.{key}": tensor
        for index, name in enumerate(_trained(model, optimizer))
        for key, tensor in state["state"].get(index, {}).items()
    }
    told = dict(zip(KEYS, (fingerprint, progress, schedule.state_dict(), state["param_groups"]), strict=True))
    with replaced_folder(folder) as new:
        save_adapter(model, new, base)
        (new / STATE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        try:
            save_file(moments, new / STATE_TENSORS)
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written ({error}); earlier checkpoints are untouched") from None
        shutil.copymode(new / STATE, new / STATE_TENSORS)  # safetensors writes files that only their owner reads


def load_checkpoint(folder: Path, model: nn.Module, optimizer, schedule, fingerprint: dict) -> dict:
    """Puts model, optimizer and schedule into the state that was saved; returns the progress.

    Raises:
        ValueError: the run is another one (every difference is named), or the checkpoint is broken. Nothing has changed then.
    """
    try:
        told, tensors = json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / STATE_TENSORS)
        earlier, progress, of_schedule, of_groups = (told[key] for key in KEYS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder} is broken ({error!r}): resume from another") from None
    names = _trained(model, optimizer)
    changed = differences(earlier, json.loads(json.dumps(fingerprint)))
    if changed:
        raise ValueError(f"{folder} is of another run, and cannot be resumed by this one (was → is):\n  " + "\n  ".join(changed))
    misshapen = _misshapen(tensors, model, names)
    if misshapen:
        raise ValueError(f"the checkpoint {folder} is broken, lacks or misshapes {', '.join(misshapen)}: resume from another")
    load_adapter(model, folder, adapter_name=adapters_of(model).active)
    state = {index: _under(f"optimizer.{name}.", tensors) for index, name in enumerate(names)}
    optimizer.load_state_dict({"state": state, "param_groups": of_groups})
    schedule.load_state_dict(of_schedule)
    return progress


def _misshapen(tensors: dict[str, Tensor], model: nn.Module, names: list[str]) -> list[str]:
    """Moments that do not fit; AdamW has none of a parameter that never had a gradient."""
    expected = {}
    for name in names:
        moments = _under(f"optimizer.{name}.", tensors)
        shape = model.get_parameter(name).shape
        expected |= {f"optimizer.{name}.{key}": () if key == "step" else shape for key in moments}
    return [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _trained(model: nn.Module, optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
