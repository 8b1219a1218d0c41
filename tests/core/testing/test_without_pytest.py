"""Who trains needs no pytest: the quickstart's environment has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REVERSE = Path(__file__).parents[3] / "examples" / "reverse"
WITHOUT = "import sys; sys.modules['pytest'] = None; "


@pytest.mark.parametrize(
    "what", ["from miles_core.testing.reverse import write", "from miles_core.testing import run, write_tiny"]
)
def test_what_writes_the_data_of_a_run_is_there(what: str) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT + what], check=True)
    assert "miles_core.testing" in (REVERSE / "make.py").read_text()


def test_the_checks_are_there_beside_pytest() -> None:
    import miles_core.testing as kit

    assert all(hasattr(kit, name) for name in kit.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Checks'"):
        _ = kit.Checks
