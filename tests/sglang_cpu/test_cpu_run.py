"""A whole run on a CPU, trainer and all, with SGLang's own server as its engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_cases import CPU
from miles_core.testing import reverse
from together.whole_runs import processes_of

pytestmark = [pytest.mark.sglang_cpu, pytest.mark.timeout(1200)]

RUN = """\
algorithm = "grpo"
steps = 3
seed = 0
mode = "sync"

[model]
path = "data/model"

[data]
train = "data/train.jsonl"

[reward.positions]
weight = 1.0

[batch]
groups = 8
group_size = 4
updates = 2

[rollout]
max_tokens = 5

[optim]
lr = 4e-4

[placement]
layout = "cpu"
"""
KL_MOST = 1e-6  # in float32, of what the trainer thinks of a token and what the engine thought


def test_a_run_samples_with_the_weights_that_it_has_just_trained(tmp_path: Path) -> None:
    reverse.write(tmp_path / "data")
    (tmp_path / "run.toml").write_text(RUN)
    cli = [sys.executable, "-c", "from miles_core.cli import main; main()", "run", "run.toml", str(CPU)]
    run = subprocess.run(
        [*cli, "--set", "run_dir=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"TERM": "dumb"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["weight_version"] for row in rows] == [1, 2, 3]
    assert all(row["staleness/max"] == 0 and abs(row["kl/train_rollout"]) < KL_MOST for row in rows)
    assert not processes_of(str(tmp_path))
