"""What the modes learn: the quickstart with every `mode`, seed by seed, and the reward and accuracy it ends with.

    python benchmarks/learning.py --seeds 3 --out benchmarks/results/learning

Every run is `miles run` on examples/reverse/run.toml with nothing changed but the mode, the seed, the folder and the
learning rate, which falls to a tenth, so that the end is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "reverse"
MILES = str(Path(sys.executable).with_name("miles"))
LAST = 10  # steps whose rewards are averaged
FALLING = ["optim.schedule=linear", "optim.min_lr=4e-5"]
TWO = ["mode=async", "rollout.max_staleness=2"]
MODES = {
    "sync": ["mode=sync"],
    "overlap": ["mode=overlap"],
    "async, 1 version": ["mode=async", "rollout.max_staleness=1"],
    "async, 2": TWO,
    "async, 2, old_logprobs = engine": [*TWO, "batch.old_logprobs=engine"],
}


def learn(keys: list[str], seed: int, steps: int) -> dict[str, float]:
    """One run, as a user starts it: its last rewards, its held-out accuracy, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [*keys, *FALLING, f"seed={seed}", f"steps={steps}", f"run_dir={folder}/run"]
        sets = [word for key in keys for word in ("--set", key)]
        subprocess.run([MILES, "run", str(EXAMPLE / "run.toml"), *sets], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    steps_s = sum(row["time/step"] for row in rows if row["step"])
    return {
        "reward": statistics.fmean(row["reward/mean"] for row in rows[-LAST:]),
        "accuracy": rows[-1]["eval/accuracy"],
        "stale": statistics.fmean(row.get("staleness/mean", 0.0) for row in rows if row["step"]),
        "seconds": rows[-1]["time_s"],
        "steps/s": steps / steps_s,
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        f"| mode | mean reward of the last {LAST} steps (each seed) | held-out accuracy | mean staleness | run, s |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        each = ", ".join(f"{row['reward']:.3f}" for row in rows)
        accuracy = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        mean = statistics.fmean(row["reward"] for row in rows)
        stale, seconds = (statistics.median(row[key] for row in rows) for key in ("stale", "seconds"))
        lines.append(f"| {name} | {mean:.3f} ({each}) | {accuracy} | {stale:.2f} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    subprocess.run([sys.executable, str(EXAMPLE / "make.py")], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for seed in range(args.seeds):  # the modes in turns, so that what else the machine does falls on all of them
        for name, keys in MODES.items():
            found[name].append(learn(keys, seed, args.steps))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
            if args.out:  # what was measured stays, whatever becomes of the rest
                args.out.parent.mkdir(parents=True, exist_ok=True)
                told = {"steps": args.steps, "runs": found, "at": time.strftime("%F")}
                args.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    print(table(found))
    if args.out:
        args.out.with_suffix(".md").write_text(f"# Learning in each mode\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
