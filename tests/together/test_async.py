"""Streaming rollouts: numbers that must not change, staleness that must not be exceeded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import in_threads, timeless

pytestmark = pytest.mark.slow

MILES = str(Path(sys.executable).with_name("miles"))


@pytest.fixture(scope="module")
def go(runs: Any) -> Callable[..., list[dict[str, float]]]:
    """A run whose processes are threads of this one."""

    def go(name: str, *keys: str) -> list[dict[str, float]]:
        in_threads(runs.folder / "run.toml", runs.folder / name, *keys)
        rows: list[dict[str, float]] = runs.metrics(name)
        return rows

    return go


def audited(runs: Any, name: str) -> str:
    done = subprocess.run([MILES, "audit", name], cwd=runs.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("drops", [False, True])
def test_without_staleness_it_is_the_synchronous_run(go: Any, runs: Any, drops: bool) -> None:
    """Also where groups are dropped, and others sampled in their place: by waves there, one by one here."""
    keys = ["batch.group_size=2", "grpo.dynamic_sampling=true"] if drops else []
    turns = go(f"turns-{drops}", "mode=sync", *keys)
    stream = go(f"stream-0-{drops}", "mode=async", "rollout.max_staleness=0", *keys)
    dropped = sum(int(row["rollout/dropped_groups"]) for row in turns if row["step"])
    assert (dropped > 3) == drops
    streamed, turned = timeless(stream), timeless(turns)
    if drops:  # the engine's batches are others, and the last bits of its log-probabilities with them
        for one, other in zip(streamed[1:], turned[1:], strict=True):
            assert one.pop("kl/train_rollout") == pytest.approx(other.pop("kl/train_rollout"), abs=1e-6)
    assert streamed == turned
    told = audited(runs, f"stream-0-{drops}")
    assert f"{48 + dropped} taken," in told and "48 trained\n" in told


@pytest.mark.parametrize("weights", ["drain", "retract", "in_place"])
def test_no_token_is_older_than_was_said(go: Any, runs: Any, weights: str) -> None:
    rows = go(f"stream-{weights}", "mode=async", "rollout.max_staleness=2", f"rollout.weights={weights}", "steps=12")
    stale = [row["staleness/max"] for row in rows if row["step"]]
    assert len(stale) == 12 and max(stale) <= 2 and max(stale) > 0
    busy = [row["utilization/engines"] for row in rows if row["step"]]
    assert len(busy) == 12 and 0 < max(busy) <= 1 and min(busy) >= 0
    assert f"{12 * 8} trained" in audited(runs, f"stream-{weights}")
    if weights != "drain":
        training, still = (
            spans(runs.folder / f"stream-{weights}", *what) for what in (("trainer", "train"), ("engine", "sync"))
        )
        shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in training for b in still)
        assert training and still and shared < 0.2 * sum(ended - began for began, ended in training)


def spans(run: Path, process: str, doing: str) -> list[tuple[float, float]]:
    """When processes of this kind began and ended to do this."""
    events = json.loads((run / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found = [e for e in events if e["ph"] == "X" and e["name"] == doing and names[e["pid"]].startswith(process)]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]
