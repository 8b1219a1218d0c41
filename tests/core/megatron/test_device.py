"""The CPU layer notices when a substitution does not take. In a process of its own, which it changes for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_self_check_notices_each_missing_substitution() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("device_faults.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Megatron's warnings about what a laptop lacks must not reach the user"
