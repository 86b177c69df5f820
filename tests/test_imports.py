"""The one-way flow of the house, what it may depend on, and what importing it costs."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ["adapters", "data", "demo", "reporting", "training"]
PACKAGES = (
    {"minilora": ROOT / "minilora"}
    | {f"minilora.{folder}": ROOT / "minilora" / folder for folder in FOLDERS}
    | {"minilora.kernels": ROOT / "kernels", "minilora.phi3": ROOT / "phi3"}
)
MEETING_ROOMS = {"minilora/commands.py", "demo/demo.py", "demo/weights.py"}  # where the LoRA library and phi3 meet
EXTRAS = {"gguf", "pyarrow", "rouge-score", "wandb"}  # of setup.py's extras


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively: spell the name out"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].glob("*.py"))


def in_folder(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "minilora"}


@pytest.mark.parametrize("file", sources("minilora.kernels"), ids=lambda file: file.name)
def test_kernels_import_nothing_of_ours_but_one_another(file):
    assert all(name.startswith("minilora.kernels.") for name in ours(imports(file)))


@pytest.mark.parametrize("file", sources("minilora.phi3"), ids=lambda file: file.name)
def test_phi3_imports_kernels_and_never_the_lora_library(file):
    assert all(name.startswith(("minilora.kernels.", "minilora.phi3.")) for name in ours(imports(file)))


@pytest.mark.parametrize("file", sources("minilora.adapters"), ids=lambda file: file.name)
def test_the_lora_library_imports_kernels_and_nothing_of_the_program_around_it(file):
    rooms = ("minilora.adapters.", "minilora.kernels.", "minilora.files.", "minilora.settings.")
    assert all(name.startswith(rooms) for name in ours(imports(file)))


@pytest.mark.parametrize("file", sorted((ROOT / "minilora").rglob("*.py")), ids=in_folder)
def test_only_the_meeting_rooms_import_phi3(file):
    of_phi3 = {name for name in imports(file) if name.startswith("minilora.phi3")}
    assert not of_phi3 or in_folder(file) in MEETING_ROOMS


@pytest.mark.parametrize("file", [*sorted(ROOT.glob("*/*.py")), *sorted(ROOT.glob("*/*/*.py"))], ids=in_folder)
def test_no_file_imports_the_folders_by_their_names(file):
    """In the repository root `import kernels` works, and loads every module a second time under another name."""
    assert not {name for name in imports(file) if name.split(".")[0] in ("kernels", "phi3")}


def installed_with(distribution: str) -> set[str]:
    """The distributions that come along with one on this platform, by what their metadata ask for without extras."""
    found, queue = set(), [distribution]
    while queue:
        for requirement in map(Requirement, requires(queue.pop()) or ()):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(name)
                queue.append(name)
    return found


def test_everything_imported_comes_with_the_declared_dependencies():
    """install_requires names five distributions; whatever else is imported must come along with them."""
    assert sum("extra" not in line for line in requires("minilora")) <= 5
    declared = installed_with("minilora")
    of_module = packages_distributions()
    for package in PACKAGES:
        for file in sources(package):
            for module in {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names - {"minilora"}:
                names = {re.sub(r"[-_.]+", "-", name).lower() for name in of_module[module]}
                assert names & (declared | EXTRAS), f"{file} imports {module}, which the declared dependencies do not bring"


def test_every_folder_with_sources_is_a_package_that_setup_installs():
    folders = {file.parent for top in ("minilora", "kernels", "phi3") for file in (ROOT / top).rglob("*.py")}
    assert folders == set(PACKAGES.values())
    made = re.search(r"FOLDERS = (\[.*\])", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert ast.literal_eval(made[1]) == FOLDERS


def in_fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_minilora_imports_no_room_of_it_and_not_torch():
    code = "import sys, minilora; print(sorted(m for m in sys.modules if m.startswith('minilora.') or m == 'torch'))"
    assert in_fresh_python(code).strip() == "[]"


def test_every_public_name_is_found():
    code = "import minilora; print(len([getattr(minilora, name) for name in minilora.__all__]), minilora.train.__module__)"
    assert in_fresh_python(code).split()[1] == "minilora.training.loop"


def test_importing_the_rooms_needs_no_triton_and_touches_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import minilora.kernels.lora_linear, minilora.kernels.cross_entropy, minilora.phi3, minilora.training.loop, torch\n"
        "print(torch.cuda.is_initialized())"
    )
    assert in_fresh_python(code).strip() == "False"


def test_training_from_folders_imports_little_besides_torch():
    """Imported and left out at once: 1.5 s of CPU time with torch._dynamo, 0.4 s with huggingface_hub, 0.2 s with neither."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import minilora; from minilora import phi3\n"
        "minilora.train, minilora.inject, minilora.save_adapter, phi3.load, phi3.load_tokenizer\n"
        "print(*{name for name in sys.modules if name not in before})"
    )
    names = set(in_fresh_python(code).split())
    assert "minilora.training" in names
    assert not names & {"torch._dynamo", "sympy", "triton"}
    allowed = {"minilora", "safetensors", "tokenizers", "numpy", "tqdm", "jinja2", "markupsafe", "torch"}
    heads = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert {head for head in heads if not head.startswith("_")} <= allowed


def test_a_plain_install_is_at_most_27_distributions():
    """Of torch for CPUs; minilora itself is one of them. CUDA's libraries come with torch for GPUs alone."""
    found = {name for name in installed_with("minilora") if not name.startswith(("nvidia-", "cuda-"))}
    assert {"torch", "numpy", "huggingface-hub"} <= found
    assert len(found) + 1 <= 27, sorted(found)


def test_every_source_file_has_its_test_of_the_same_stem():
    for package, folder in PACKAGES.items():
        for file in sources(package):
            if not file.name.startswith("__"):
                test = ROOT / "tests" / f"test_{folder.name}_{file.stem}.py"
                assert test.exists(), f"{file} has no {test.name}"
