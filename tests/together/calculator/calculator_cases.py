"""What tests of the calculator example share: its files, and what its samples say of themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

CALCULATOR = Path(__file__).parents[3] / "examples" / "calculator"
PROMPT = "12+30="
CALL = "<call>12+30</call>"
RUN = f"""\
algorithm = "grpo"
plugins = ["{CALCULATOR / "calculator.py"}"]
model.path = "model"
data.train = "train.jsonl"
rollout.max_tokens = 60
calculator.result_tokens = 40
"""


def module(name):
    """A script of the example, imported."""
    spec = importlib.util.spec_from_file_location(f"calculator_{name}", CALCULATOR / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def result(sample, turn=0):
    return sample.info["turns"][turn]["result"]


def fault(sample, turn=0):
    return sample.info["turns"][turn]["fault"]
