"""A model so small that a whole run, processes and all, takes seconds; started the way a user starts one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MILES = str(Path(sys.executable).with_name("miles"))

RUN = """\
algorithm = "grpo"
steps = 6
seed = 3

[model]
path = "data/model"

[data]
train = "data/train.jsonl"
eval = "data/eval.jsonl"

[reward.positions]
weight = 0.5
[reward.exact_match]
weight = 0.5

[batch]
groups = 8
group_size = 4
updates = 2
micro_tokens = 128

[rollout]
max_tokens = 6

[optim]
lr = 1e-3

[eval]
every = 3
prompts = 16
accuracy = "exact_match"

[checkpoint]
every = 2
"""


@pytest.fixture(scope="session")
def reverse_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's own model and prompts, away from those that a user may be training on."""
    data = tmp_path_factory.mktemp("reverse") / "data"
    subprocess.run([sys.executable, "-m", "miles_core.testing.reverse", data], check=True, capture_output=True)
    return data


class Runs:
    """Run files in one folder, and what came of them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        shutil.copytree(data, folder / "data")
        (folder / "run.toml").write_text(RUN)

    def start(self, name: str, *args: str, file: str = "run.toml", **options) -> subprocess.Popen[str]:
        ask = [MILES, "run", file, "--set", f"run_dir={name}", *args]
        return subprocess.Popen(ask, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=os.environ | {"TERM": "dumb"}, **options)  # fmt: skip

    def run(self, name: str, *args: str, expect: int = 0, **options) -> subprocess.CompletedProcess[str]:
        process = self.start(name, *args, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, f"status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name: str) -> dict:
        from safetensors.torch import load_file

        return load_file(next((self.folder / name / "model").glob("*.safetensors")))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, reverse_data) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), reverse_data)
