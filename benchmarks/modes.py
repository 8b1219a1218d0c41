"""Samples per second in each mode, where responses have heavy-tailed lengths; the engine is simulated, the loop is not.

    python benchmarks/modes.py --out benchmarks/results/modes

The trainer is a model of a few thousand parameters, which sleeps as long in each step as a training step of the same
share would take; everything else is what every run does: prompts, ledger, queue, staleness, checkpoints, weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.testing.runs import INLINE, write_tiny

sys.path.insert(0, str(Path(__file__).parent))
ENGINE = Path(__file__).parent / "simulated" / "engine.py"
MODES = {"sync": ("sync", 0), "overlap": ("overlap", 0), "async, 1 version": ("async", 1), "async, 2": ("async", 2),
         "async, 4": ("async", 4)}  # fmt: skip
GROUPS, ATTEMPTS, WARM = 16, 4, 4


def keys(data: Path, folder: Path, mode: str, staleness: int, seed: int, args: Any) -> list[str]:
    streaming = {"rollout.max_staleness": staleness} if mode == "async" else {}
    table = {
        "algorithm": "grpo",
        "plugins": [str(ENGINE), str(INLINE)],
        "mode": mode,
        "steps": args.steps,
        "seed": seed,
        "run_dir": str(folder),
        "model.path": str(data / "model"),
        "data.train": str(data / "train.jsonl"),
        "reward.positions.weight": 1.0,
        "batch.groups": GROUPS,
        "batch.group_size": ATTEMPTS,
        "batch.max_age": 64,
        "rollout.max_tokens": args.tokens,
        "use.engines": "engine",
        "engine.train_s": args.train_s,
        "engine.slots": args.slots,
        "engine.sigma": args.sigma,
        **streaming,
    }
    return [f"{key}={json.dumps(value)}" for key, value in table.items()]


def rate(data: Path, mode: str, staleness: int, seed: int, args: Any) -> dict[str, float]:
    """Samples per second of the steps after the first few."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(action="ignore"):
        from miles_core.loop.driver import train

        folder = (args.keep or Path(temporary)).resolve() / f"{mode}-{staleness}-{seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        asyncio.run(
            train(assemble(Source([], keys(data, folder, mode, staleness, seed, args))).at(folder), folder, False)
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if WARM < row["step"] < args.steps]
    return {
        "samples/s": len(rows) * GROUPS * ATTEMPTS / sum(row["time/step"] for row in rows),
        "stale": statistics.fmean(row["staleness/mean"] for row in rows),
        "stalest": max(row["staleness/max"] for row in rows),
        "too_old": sum(row["staleness/too_old"] for row in rows),
        "waited": sum(row["time/wait"] for row in rows) / sum(row["time/step"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000, help="most of a response")
    parser.add_argument("--slots", type=int, default=64, help="requests the engine serves at once")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of a response's length")
    parser.add_argument("--train-s", dest="train_s", type=float, default=0.25, help="seconds of a training step")
    parser.add_argument("--keep", type=Path, help="a folder in which the runs stay, with their traces")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory() as folder:
        data = write_tiny(Path(folder))
        config = json.loads((data / "model/config.json").read_text())
        (data / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * args.tokens}))
        for seed in range(args.seeds):  # in turns, so that what else the machine does falls on all of them
            for name, (mode, staleness) in MODES.items():
                found[name].append(rate(data, mode, staleness, seed, args))
    base = {name: statistics.median(row["samples/s"] for row in rows) for name, rows in found.items()}
    lines = [
        "| mode | samples/s | of sync | of overlap | mean staleness | most | trainer waited |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in ("stale", "waited")}
        most = max(row["stalest"] for row in rows)
        ratios = f"{base[name] / base['sync']:.2f} | {base[name] / base['overlap']:.2f}"
        lines.append(
            f"| {name} | {base[name]:.1f} | {ratios} | {mean['stale']:.2f} | {most:.0f} | {mean['waited']:.0%} |"
        )
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "settings": {k: v for k, v in vars(args).items() if k not in ("out", "keep")},
            "runs": found,
            "at": time.strftime("%F"),
        }
        args.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("# Modes\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
