"""Whole runs, started as a user starts them, by what they write into metrics.jsonl."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .models import write
from .table import Report, Row

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
WORKLOAD = Path(__file__).with_name("workload.toml")
MILES = [sys.executable, "-c", "from miles_core.cli import main; main()"]
STEPS, WARM = 14, 4  # of a run; the first ones find kernels and memory
APART = 10  # steps from one checkpoint to the next, which waits until the one before is on the disk
SAMPLES = 64 * 16  # a step of the example: groups of gpu.toml, attempts of run.toml
BAR, STALL, ACCURACY = 0.08, 0.05, 0.95
PARTS = ("step", "sample", "reward", "train", "sync", "checkpoint", "other")
Rows = list[dict[str, float]]


def miles_run(files: Sequence[Path], where: Path, *options: str, gpus: str = "") -> Rows:
    """``miles run`` with ``options`` as --set, its folder ``where``; the lines of metrics.jsonl.

    ``gpus`` are the numbers of those that it may use; all of them where it is empty.
    """
    words = [word for one in (f"run_dir={where}", *options) for word in ("--set", one)]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
    subprocess.run([*MILES, "run", *files, *words], check=True, env=env)
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


def usual(rows: Rows, last: int) -> Rows:
    """Without the first few, and the last one, which writes a checkpoint and sends no weights ahead."""
    return [row for row in rows if WARM < row["step"] < last]


def example(work: Path, sglang: Path, name: str, *options: str) -> Rows:
    """The usual steps of the arithmetic example with 100M parameters."""
    subprocess.run([sys.executable, EXAMPLE / "make.py", "--size", "100M"], check=True)
    given = (f"steps={STEPS}", "eval.every=0", "checkpoint.every=0", *options)
    files = [EXAMPLE / "run.toml", EXAMPLE / "gpu.toml", sglang]
    return usual(miles_run(files, work / f"{name}-{time.time_ns()}", *given), STEPS)


def rest(row: dict[str, float]) -> float:
    """The share of a step, taken in turns, that is neither sampling nor rewarding nor training."""
    return 1 - sum(row[f"time/{part}"] for part in ("sample", "reward", "train")) / row["time/step"]


def told(rows: Rows) -> str:
    parts = {part: 1e3 * statistics.median(row.get(f"time/{part}", 0.0) for row in rows) for part in PARTS}
    return ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items())


def share(name: str, what: str, rows: Rows) -> Row:
    value = statistics.median(map(rest, rows))
    return Row(
        name,
        f"share of a colocated step that is neither sampling nor training nor rewards, {what}",
        value,
        bar=f"under {BAR:g}",
        met=value < BAR,
        note=f"medians of {len(rows)} steps, in ms: {told(rows)}",
    )


def step(names: list[str], work: Path, sglang: Path, report: Report) -> None:
    """The rows "step" and "checkpoint" of a 0.6B model, and "step-100M" of the example."""
    if {"step", "checkpoint"} & set(names):
        options = [f"model.path={write(work, '0.6B')}", "placement.layout=colocate", "sglang.mem_fraction_static=0.4"]
        options += [f"checkpoint.every={APART}", "checkpoint.keep=1", f"steps={3 * APART + 1}"]
        colocated(miles_run([WORKLOAD, sglang], work / f"step-{time.time_ns()}", *options), report)
    if "step-100M" in names:
        rows = example(work, sglang, "colocate", "placement.layout=colocate")
        report(share("step-100M", "100M, the arithmetic example: 1,024 samples of at most 4 tokens", rows))


def colocated(rows: Rows, report: Report) -> None:
    """The rows "step" and "checkpoint", of all steps of a run."""
    rows = usual(rows, 3 * APART + 1)
    plain = [row for row in rows if "time/checkpoint" not in row]
    saving = [row for row in rows if "time/checkpoint" in row]
    report(share("step", "0.6B, 256 prompts x 256 tokens", plain))
    stall = statistics.median(row["time/checkpoint"] for row in saving)
    usually = statistics.median(row["time/step"] for row in plain)
    report(
        Row(
            "checkpoint",
            "training stands still for a checkpoint of 0.6B parameters, optimizer included",
            stall,
            "s",
            usually,
            "a step",
            stall / usually,
            f"under {STALL:g}",
            stall < STALL * usually,
            "each: " + ", ".join(f"{row['time/checkpoint']:.3f}" for row in saving),
        )
    )


def layouts(work: Path, sglang: Path, report: Report) -> None:
    """Two GPUs used in turns by both sides, and one for each side."""
    two = ("placement.trainers=2", "placement.engines=2")
    turns = example(work, sglang, "turns", "placement.layout=colocate", *two)
    side_by_side(turns, example(work, sglang, "split", "placement.layout=split", "mode=overlap"), report)


def side_by_side(turns: Rows, apart: Rows, report: Report) -> None:
    """The row "split", of the usual steps of both runs."""
    rates = [SAMPLES / statistics.median(row["time/step"] for row in rows) for rows in (apart, turns)]
    report(
        Row(
            "split",
            "split and overlapped, 100M, two GPUs",
            rates[0],
            "samples/s",
            rates[1],
            "colocated in turns",
            rates[0] / rates[1],
            "report both",
            note=f"medians of {len(apart)} and {len(turns)} steps",
        )
    )


def learning(work: Path, sglang: Path, out: Path, report: Report) -> None:
    """The arithmetic example as examples/arithmetic/gpu.toml has it; its metrics are kept in ``out``, for the curve."""
    subprocess.run([sys.executable, EXAMPLE / "make.py", "--size", "100M"], check=True)
    where = work / f"learning-{time.time_ns()}"
    rows = miles_run([EXAMPLE / "run.toml", EXAMPLE / "gpu.toml", sglang], where)
    (out / "arithmetic-100M").mkdir(parents=True, exist_ok=True)
    shutil.copy(where / "metrics.jsonl", out / "arithmetic-100M")
    seen = {int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    report(
        Row(
            "learning",
            "held-out accuracy of the arithmetic example, 100M",
            rows[-1]["eval/accuracy"],
            bar=f"at least {ACCURACY:g}",
            met=rows[-1]["eval/accuracy"] >= ACCURACY,
            note=f"{rows[-1]['time_s']:.0f} s; after steps " + ", ".join(f"{at}: {x:.3f}" for at, x in seen.items()),
        )
    )
