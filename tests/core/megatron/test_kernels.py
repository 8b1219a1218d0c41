"""Triton kernels agree with the formulas that run without a GPU; here in Triton's interpreter, which needs none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch on Linux")
def test_kernels_agree_with_the_formulas() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets or compiles."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "kernel_checks.py", "cpu"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("check_") == 10, done.stdout
