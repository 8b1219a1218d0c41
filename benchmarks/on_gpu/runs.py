"""Whole runs of the arithmetic example with 100M parameters, by what they write into metrics.jsonl."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .table import Report, Row

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
MILES = [sys.executable, "-c", "from miles_core.cli import main; main()"]
STEPS, WARM = 14, 4  # of a run; the first ones find kernels and memory
SAMPLES = 64 * 16  # a step: groups of gpu.toml, attempts of run.toml
BAR = 0.08
PARTS = ("step", "sample", "reward", "train", "sync", "other")


def metrics(work: Path, sglang: Path, name: str, *options: str) -> list[dict[str, float]]:
    """Of every step of a run with ``options`` but the first few, and the last one, which writes a checkpoint."""
    subprocess.run([sys.executable, EXAMPLE / "make.py", "--size", "100M"], check=True)
    where = work / f"{name}-{time.time_ns()}"
    given = (f"steps={STEPS}", "eval.every=0", "checkpoint.every=0", f"run_dir={where}", *options)
    files = [EXAMPLE / "run.toml", EXAMPLE / "gpu.toml", sglang]
    subprocess.run([*MILES, "run", *files, *(word for one in given for word in ("--set", one))], check=True)
    rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if WARM < row["step"] < STEPS]


def rest(row: dict[str, float]) -> float:
    """The share of a step, taken in turns, that is neither sampling nor rewarding nor training."""
    return 1 - sum(row[f"time/{part}"] for part in ("sample", "reward", "train")) / row["time/step"]


def step(work: Path, sglang: Path, report: Report) -> None:
    rows = metrics(work, sglang, "colocate", "placement.layout=colocate")
    share = statistics.median(map(rest, rows))
    parts = {part: 1e3 * statistics.median(row[f"time/{part}"] for row in rows) for part in PARTS}
    told = ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items())
    report(
        Row(
            "step",
            "share of a colocated step that is neither sampling nor training nor rewards, 100M",
            share,
            bar=f"under {BAR:g}",
            met=share < BAR,
            note=f"medians of {len(rows)} steps, in ms: {told}",
        )
    )


def layouts(work: Path, sglang: Path, report: Report) -> None:
    """Two GPUs used in turns by both sides, and one for each side."""
    two = ("placement.trainers=2", "placement.engines=2")
    turns = metrics(work, sglang, "turns", "placement.layout=colocate", *two)
    apart = metrics(work, sglang, "split", "placement.layout=split", "mode=overlap")
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
            note=f"medians of {len(turns)} steps",
        )
    )
