"""PPO, DPO and SFT on the quickstart's task, as a user runs them: what they learn, and how long that takes.

    python benchmarks/algorithms.py --seeds 3 --out benchmarks/results/algorithms

Every run is `miles run` on an example file with nothing changed but the seed and the folder; its time is that of the
whole command, the start of all processes included. A bar is reached with the first held-out accuracy that is as high,
as soon as it stands in `metrics.jsonl`; the examples evaluate every 20 steps, so it may have been reached earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "reverse"
MILES = str(Path(sys.executable).with_name("miles"))
BARS = {"ppo": (0.90, 300), "dpo": (0.95, 120), "sft": (0.95, 60)}  # held-out accuracy, and seconds to get there


def evaluations(folder: Path) -> list[float]:
    """The held-out accuracies so far; a line that is being written is left for later."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]


def learn(name: str, seed: int) -> dict[str, Any]:
    """One run, from the command to its end."""
    bar, _ = BARS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        sets = [word for key in (f"seed={seed}", f"run_dir={folder}") for word in ("--set", key)]
        load, reached, began = os.getloadavg()[0], None, time.perf_counter()
        run = subprocess.Popen([MILES, "run", str(EXAMPLE / f"{name}.toml"), *sets], stdout=subprocess.DEVNULL)
        while run.poll() is None:
            time.sleep(0.1)
            if reached is None and max(evaluations(folder), default=0.0) >= bar:
                reached = time.perf_counter() - began
        seconds, accuracies = time.perf_counter() - began, evaluations(folder)
    if run.returncode:
        raise SystemExit(f"{name}, seed {seed}: miles run ended with status {run.returncode}")
    if reached is None and max(accuracies) >= bar:
        reached = seconds
    found = {"seed": seed, "before": accuracies[0], "after": accuracies[-1], "accuracies": accuracies}
    return found | {"to the bar, s": reached, "run, s": seconds, "load": load}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| example | the bar | before (each seed) | after | to the bar, s | whole command, s | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        if not rows:
            continue
        bar, limit = BARS[name]
        before, after = (", ".join(f"{row[key]:.3f}" for row in rows) for key in ("before", "after"))
        reached = ", ".join("never" if row["to the bar, s"] is None else f"{row['to the bar, s']:.0f}" for row in rows)
        whole, load = (statistics.median(row[key] for row in rows) for key in ("run, s", "load"))
        lines.append(
            f"| {name} | {bar:.2f} within {limit} s | {before} | {after} | {reached} | {whole:.0f} | {load:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    subprocess.run([sys.executable, str(EXAMPLE / "make.py")], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for seed in range(args.seeds):  # in turns, so that what else the machine does falls on all of them
        for name in args.only:
            found[name].append(learn(name, seed))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
            if args.out:  # what was measured stays, whatever becomes of the rest
                args.out.parent.mkdir(parents=True, exist_ok=True)
                told = {"bars": BARS, "runs": found, "cores": os.cpu_count(), "at": time.strftime("%F")}
                args.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    print(table(found))
    if args.out:
        note = f"Whole commands on {os.cpu_count()} cores; loads and times are medians."
        args.out.with_suffix(".md").write_text(f"# What the algorithms learn\n\n{note}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
