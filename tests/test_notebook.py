"""The notebook runs from first cell to last, here by exec on a tiny model in 2 steps; what it shows is of a real run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from minilora.demo import weights as demo_weights
from minilora.training import planning

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "finetune_phi3.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run_one_after_the_other(monkeypatch, tiny_checkpoint, capsys):
    monkeypatch.setattr(demo_weights, "obtain", lambda: tiny_checkpoint)
    monkeypatch.setattr(planning, "SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str))
    names = {}
    for cell in CELLS:
        code = "".join(cell["source"]).replace("STEPS = 32", "STEPS = 2")
        exec(compile(code, "finetune_phi3.ipynb", "exec"), names)
    assert names["result"].steps == 2
    assert (names["folder"] / "merged" / "model.safetensors").exists()
    said = capsys.readouterr().out
    after, loaded, merged = (
        names["after"].loss,
        *(float(said.split(how)[1].split()[0]) for how in ("again: loss", "merged: loss")),
    )
    assert abs(loaded - after) < 2e-3
    assert abs(merged - after) < 2e-3


def shown(cell) -> str:
    return "".join(text for output in cell["outputs"] for text in output.get("text", []))


def test_what_it_shows_is_of_one_real_run_from_first_to_last():
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 1
    assert "134,515,008 parameters" in " ".join(map(shown, CELLS))
    answers = shown(CELLS[-1]).splitlines()
    pairs = list(zip(answers[1::3], answers[2::3], strict=True))
    assert len(pairs) == 4
    assert sum(wanted.split(maxsplit=1)[1] == given.split(maxsplit=1)[1] for wanted, given in pairs) >= 3
