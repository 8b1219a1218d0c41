"""Samples per second in each mode on two GPUs, one for each side, where responses have heavy-tailed lengths.

    python benchmarks/gpu_modes.py --out benchmarks/results/gpu-modes --traces DIR

Every run is `miles run` with nothing simulated: SGLang, Megatron, NCCL. The model is small and has random weights,
lengths are log-normal, and the reward, the share of tokens of one half of the vocabulary, is one that every step
raises. Each pair of GPUs takes one run at a time. Runs that are in OUT.json are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

from gpu import SGLANG, machine, visible
from on_gpu.models import write
from on_gpu.runs import WARM, WORKLOAD, miles_run

MODES = {  # the versions that tokens may be behind, and what becomes of responses under way when weights arrive
    "sync": ("sync", 0, ""),
    "overlap": ("overlap", 1, ""),
    **{
        f"async, {behind}, {how}": ("async", behind, how.replace(" ", "_"))
        for behind in (1, 2, 4)
        for how in ("retract", "in place")
    },
}
ATTEMPTS = 8  # of a group, as in workload.toml
LAST = 5  # steps whose rewards are averaged
BARS = {"sync": 1.6, "overlap": 1.28}
Found = dict[str, dict[str, Any]]  # by "mode/seed"


def keys(args: argparse.Namespace, model: Path, mode: str, seed: int) -> list[str]:
    shape = [f"workload.median={args.median}", f"workload.sigma={args.sigma}", f"rollout.max_tokens={args.tokens}"]
    learn = [f"optim.lr={args.lr}", f"batch.groups={args.groups}", f"steps={args.steps}", f"seed={seed}"]
    (kind, behind, how), streaming = MODES[mode], []
    if how:
        streaming = [f"rollout.max_staleness={behind}", f"rollout.weights={how}"]
    graphs = f"sglang.cuda_graph_max_bs_decode={(1 + behind) * args.groups * ATTEMPTS}"  # so many are in flight at most
    return [f"model.path={model}", "placement.layout=split", graphs, f"mode={kind}", *streaming, *shape, *learn]


def one(args: argparse.Namespace, model: Path, mode: str, seed: int, work: Path, gpus: str) -> dict[str, Any]:
    """One run on two GPUs: what it did a second in the usual steps, and what it had learned in the end."""
    where = work / f"{mode.replace(', ', '-').replace(' ', '-')}-{seed}"
    began = time.time()
    rows = miles_run([WORKLOAD, args.sglang], where, *keys(args, model, mode, seed), gpus=gpus)
    usual = [row for row in rows if WARM < row["step"] < args.steps]
    wall = sum(row["time/step"] for row in usual)
    if args.traces and not seed:
        args.traces.mkdir(parents=True, exist_ok=True)
        shutil.copy(where / "trace.json", args.traces / f"{where.name}.json")
    return {
        "samples/s": len(usual) * args.groups * ATTEMPTS / wall,
        "tokens/s": sum(row["rollout/tokens"] for row in usual) / wall,
        "first rewards": statistics.fmean(row["reward/mean"] for row in rows[:LAST]),
        "last rewards": statistics.fmean(row["reward/mean"] for row in rows[-LAST:]),
        "stale, mean": statistics.fmean(row["staleness/mean"] for row in usual),
        "stale, most": max(row["staleness/max"] for row in rows),
        "waited": sum(row["time/wait"] for row in usual) / wall,
        "trained": sum(row["time/train"] for row in usual) / wall,
        "run, s": time.time() - began,
    }


def table(found: Found) -> str:
    by = {mode: [row for name, row in sorted(found.items()) if name.startswith(f"{mode}/")] for mode in MODES}
    rates = {mode: statistics.median(row["samples/s"] for row in rows) for mode, rows in by.items() if rows}
    lines = [
        "| mode | samples/s, median (each seed) | of sync | of overlap | mean reward of the last "
        f"{LAST} steps (each seed) | staleness, mean, most | the trainer waited |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, rate in rates.items():
        rows = by[mode]
        each, learned = (
            ", ".join(f"{row[key]:.{digits}f}" for row in rows)
            for key, digits in (("samples/s", 1), ("last rewards", 3))
        )
        ratios = " | ".join(f"{rate / rates[base]:.2f}" if base in rates else "" for base in BARS)
        mean = statistics.fmean(row["last rewards"] for row in rows)
        behind = statistics.fmean(row["stale, mean"] for row in rows)
        stale = f"{behind:.2f}, {max(row['stale, most'] for row in rows):.0f}"
        waited = statistics.fmean(row["waited"] for row in rows)
        lines.append(f"| {mode} | {rate:.1f} ({each}) | {ratios} | {mean:.3f} ({learned}) | {stale} | {waited:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--groups", type=int, default=16, help=f"a step, of {ATTEMPTS} attempts each")
    parser.add_argument("--seeds", type=int, default=3)
    usual = ["sync", "overlap", "async, 2, in place"]
    parser.add_argument("--modes", nargs="+", choices=MODES, default=usual, metavar="MODE", help=" | ".join(MODES))
    parser.add_argument("--tokens", type=int, default=1024, help="most of a response")
    parser.add_argument("--median", type=float, default=128, help="tokens of a response")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of a response's length")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--sglang", type=Path, default=SGLANG, help="a TOML file with the server's arguments")
    parser.add_argument("--within", type=float, default=float("inf"), help="begin no run later than so many seconds")
    parser.add_argument("--traces", type=Path, help="a folder for the trace of each mode's first seed")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md, anew after every run")
    args = parser.parse_args()
    import torch

    if torch.cuda.device_count() < 2:
        print("needs two GPUs: nothing was measured")
        return
    path = args.out.with_suffix(".json") if args.out else None
    found: Found = json.loads(path.read_text())["runs"] if path and path.exists() else {}
    pairs: Queue[str] = Queue()
    gpus = visible(torch.cuda.device_count())
    for pair in zip(gpus[::2], gpus[1::2], strict=False):
        pairs.put(",".join(pair))
    where, writing, began = machine(), Lock(), time.monotonic()
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    del settings["within"], settings["seeds"]  # of this command, not of each run
    with tempfile.TemporaryDirectory(prefix="miles-bench-") as folder:
        model = write(Path(folder), "0.1B")

        def measure(seed: int, mode: str) -> None:
            if f"{mode}/{seed}" in found:
                return
            gpus = pairs.get()
            try:
                if time.monotonic() - began > args.within:
                    return
                row = one(args, model, mode, seed, Path(folder), gpus)
            except Exception as error:  # it is said, and the others are measured all the same
                print(f"seed {seed}, {mode}: not measured: {error}", flush=True)
                return
            finally:
                pairs.put(gpus)
            print(f"seed {seed}, {mode}: {row}", flush=True)
            with writing:
                found[f"{mode}/{seed}"] = row
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    told = {"machine": where, "settings": settings, "at": time.strftime("%F"), "runs": found}
                    path.write_text(json.dumps(told, indent=1) + "\n")
                    path.with_suffix(".md").write_text(f"# Modes on two GPUs\n\n{table(found)}\n")

        with ThreadPoolExecutor(pairs.qsize()) as pool:  # seed by seed, the modes in turns
            list(pool.map(lambda job: measure(*job), product(range(args.seeds), args.modes)))
    print(table(found))


if __name__ == "__main__":
    main()
