import sys

import pytest

from minilora import extras
from minilora.extras import require_extras


@pytest.fixture
def bare(monkeypatch):
    """A machine without any of the extras."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def test_every_package_that_is_missing_is_named_with_what_installs_it(bare):
    message = r"rougeL needs the package rouge-score; wandb .* wandb: pip install 'minilora\[rouge,wandb\]'"
    with pytest.raises(ValueError, match=message):
        require_extras(["exact_match", "rougeL", "wandb"])


def test_what_needs_no_extra_is_no_fault(bare):
    require_extras(["exact_match", "none"])


def test_what_is_installed_is_no_fault_and_is_not_imported():
    pytest.importorskip("rouge_score")
    sys.modules.pop("rouge_score")
    require_extras(["rougeL"])
    assert "rouge_score" not in sys.modules
