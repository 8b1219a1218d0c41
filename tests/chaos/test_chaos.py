"""Random kills of every kind of process: the run comes to its end, with every prompt accounted for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chaos import MILES, Chaos, rows, schedule
from victims import left_in_shared_memory

TOLERANCE = 0.1  # of rewards between 0 and 1: what streams is never quite the same twice

RUN = """\
algorithm = "grpo"
seed = 3
mode = "async"
run_dir = "run"
plugins = ["{here}/witness.py"]
steps = {steps}

[placement]
engines = {of_each}
rollout_workers = {of_each}

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
groups = {groups}
group_size = 16
updates = 2

[rollout]
max_tokens = 5

[optim]
lr = 8e-4
schedule = "linear"  # by the end rewards keep still, and can be compared
min_lr = 8e-5

[eval]
every = {steps}
prompts = 64
accuracy = "exact_match"
temperature = 0.0

[checkpoint]
every = 2

[grpo]
clip_high = 0.28
entropy = 0.1

[witness]
file = "witness.jsonl"
"""


def survive(seed: int, kills: int, steps: int, groups: int, of_each: int) -> Chaos:
    """A run under ``kills`` kills, checked; what went wrong is left in the folder that a failure names."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray's sockets are below it
    print(f"seed {seed}, in {folder}")
    subprocess.run([sys.executable, "-m", "miles_core.testing.reverse", str(folder / "data")], check=True)
    (folder / "run.toml").write_text(
        RUN.format(here=Path(__file__).parent, steps=steps, groups=groups, of_each=of_each)
    )
    before, began = set(os.listdir("/dev/shm")), time.monotonic()
    chaos = Chaos(folder, schedule(seed, kills, steps))
    chaos.turn()
    took = time.monotonic() - began
    assert not chaos.left()
    assert not left_in_shared_memory(before)
    left = [path for path in folder.glob("miles-*") if any(file.is_file() for file in path.rglob("*"))]
    everything = sum(kill.kind == "everything" for kill in chaos.kills)  # also what would have removed Ray's files
    assert len(left) <= everything, "files of Ray are left behind"
    conserved(chaos, steps, groups)
    print(f"{kills} kills and {steps} steps in {took:.0f} s; drivers that ended: {dict(chaos.ends)}")
    return chaos


def undisturbed(folder: Path) -> Path:
    """The run that is in ``folder`` once more, with no kills; where it is then."""
    text = (folder / "run.toml").read_text()
    (folder / "plain.toml").write_text(text.replace('"run"', '"plain"').replace("witness.jsonl", "plain.jsonl"))
    env = os.environ | {"TERM": "dumb", "TMPDIR": str(folder)}
    done = subprocess.run([MILES, "run", "plain.toml"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "plain"


def learned(run: Path, last: int = 20) -> float:
    """The mean reward of the last steps."""
    rewards = [row["reward/mean"] for row in rows(run / "metrics.jsonl") if row["step"]]
    return sum(rewards[-last:]) / last


def conserved(chaos: Chaos, steps: int, groups: int) -> None:
    """Every step once; every prompt in one state, trained on once, and for the step that a witness saw it come to."""
    assert [row["step"] for row in rows(chaos.run / "metrics.jsonl") if row["step"]] == list(range(1, steps + 1))
    audit = subprocess.run([MILES, "audit", "run"], cwd=chaos.folder, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "none was skipped, none trained twice" in audit.stdout
    taken, trained = (
        int(re.search(rf"([\d,]+) {what}", audit.stdout)[1].replace(",", "")) for what in ("taken", "trained")
    )
    assert trained == steps * groups <= taken
    came = dict(rows(chaos.folder / "witness.jsonl"))  # a step that was repeated counts as it was the last time
    assert came.keys() == set(range(1, steps + 1))
    seen = [id for ids in came.values() for id in ids]
    assert len(seen) == len(set(seen)) and trained <= len(seen) <= taken
    assert sum(1 for _ in rows(chaos.run / "kills.jsonl")) == len(chaos.kills)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_kills() -> None:
    """One of each kind, and two more: too few steps to learn what the reward could tell."""
    chaos = survive(seed=6, kills=10, steps=24, groups=8, of_each=1)
    shutil.rmtree(chaos.folder)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_two_hundred_kills(request: pytest.FixtureRequest) -> None:
    chaos = survive(request.config.getoption("--seed", 0), kills=200, steps=200, groups=16, of_each=2)
    killed, plain = learned(chaos.run), learned(undisturbed(chaos.folder))
    print(f"reward {killed:.3f}, and {plain:.3f} without kills")
    assert plain > 0.7, "this run cannot tell, as it does not learn the task without kills either"
    assert killed > plain - TOLERANCE, "it has not learned what a run without kills learns"
    shutil.rmtree(chaos.folder)
