"""Packages that only some settings need, told before anything is computed where one is missing."""

from collections.abc import Iterable
from importlib.util import find_spec

PACKAGES = {
    "rougeL": "rouge_score",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}  # what a setting's value imports
EXTRAS = {"rouge_score": "rouge", "tensorboard": "tensorboard", "wandb": "wandb"}


def require_extras(wanted: Iterable[str]) -> None:
    """Checks that what these settings need is installed; other names need nothing.

    Raises:
        ValueError: packages are missing; each is named with the command that installs it.
    """
    missing = {name: PACKAGES[name] for name in wanted if name in PACKAGES and find_spec(PACKAGES[name]) is None}
    if missing:
        needs = [f"{name} needs the package {package.replace('_', '-')}" for name, package in missing.items()]
        extras = ",".join(EXTRAS[package] for package in missing.values())
        raise ValueError(f"{'; '.join(needs)}: pip install 'minilora[{extras}]'")
