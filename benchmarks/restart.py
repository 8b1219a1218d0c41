"""How long a run is away after everything of it was killed: from ``miles run --resume`` to the first new step.

    python benchmarks/restart.py --out benchmarks/results/restart

writes ``restart.json`` and ``restart.md``. The quickstart, as it stands in ``examples/reverse`` but for a checkpoint
every few steps, is run until one of them counts. Then the driver, Ray's own processes, and all that they started get
SIGKILL at once, and the same command with ``--resume`` goes on. A new step is one behind the checkpoint, told of in
``metrics.jsonl``, after the resume. The modes take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from miles_core.testing.reverse import write

RUN = Path(__file__).parents[1] / "examples" / "reverse" / "run.toml"
MILES = str(Path(sys.executable).with_name("miles"))
EVERY = 4  # steps to a checkpoint
PHASES = {"starting ": "driver, checked and imported", "going on ": "processes up, models loaded"}  # what it prints
BAR_S = 20.0


def processes(folder: Path) -> list[int]:
    """All that was started from ``folder``, and what that started."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            told = Path(f"/proc/{pid}/environ").read_bytes() + os.readlink(f"/proc/{pid}/cwd").encode()
            if str(folder).encode() in told and int(pid) != os.getpid():
                found.append(int(pid))
    return found


def steps(run: Path) -> dict[int, float]:
    """When each step that was told of ended, in the run's own seconds."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {int(row["step"]): row["time_s"] for row in rows if row["step"]}


def start(folder: Path, mode: str, *more: str) -> subprocess.Popen[str]:
    keys = {"mode": mode, "run_dir": "run", "checkpoint.every": EVERY, "eval.every": 0}
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    env = os.environ | {"TERM": "dumb", "TMPDIR": str(folder)}
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen([MILES, "run", "run.toml", *sets, *more], cwd=folder, stdout=printed, stderr=printed,
                                text=True, env=env)  # fmt: skip


def wait(process: subprocess.Popen[str], folder: Path, what: Any) -> Any:
    """Until ``what()`` is true; returns it. Raises RuntimeError where the run ends before."""
    while not (answer := what()):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with status {process.returncode}:\n{(folder / 'printed').read_text()}")
        time.sleep(0.01)
    return answer


def restart(mode: str) -> dict[str, float]:
    """One run, killed and resumed: seconds from the start of the command to each phase, and to the first new step."""
    with tempfile.TemporaryDirectory(prefix="restart-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write(folder / "data")
        (folder / "run.toml").write_text(RUN.read_text())
        process = start(folder, mode)
        wait(process, folder, lambda: list((folder / "run" / "checkpoints").glob("step-*")))
        while pids := processes(folder):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
        before, began = steps(folder / "run"), time.perf_counter()
        process = start(folder, mode, "--resume")
        took = {}
        for line, phase in PHASES.items():
            wait(process, folder, lambda line=line: f"\n{line}" in "\n" + (folder / "printed").read_text())
            took[phase] = time.perf_counter() - began
        wait(process, folder, lambda: any(n > EVERY and before.get(n) != at for n, at in steps(folder / "run").items()))
        took["first new step"] = time.perf_counter() - began
        process.send_signal(signal.SIGINT)
        process.wait()
        return took


def table(results: dict[str, list[dict[str, float]]]) -> str:
    phases = [*PHASES.values(), "first new step"]
    lines = [f"| mode | {' | '.join(phases)} | fastest, slowest |", "|---" * (len(phases) + 2) + "|"]
    for mode, took in results.items():
        middle = " | ".join(f"{median(one[phase] for one in took):.1f}" for phase in phases)
        whole = [one[phases[-1]] for one in took]
        lines.append(f"| {mode} | {middle} | {min(whole):.1f}, {max(whole):.1f} |")
    return "\n".join(lines) + "\n"


def keep(out: Path | None, results: dict[str, list[dict[str, float]]], loads: list[float]) -> None:
    """After each round, so that a measurement which is cut short is not lost."""
    if out:
        about = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        told = {"machine": about, "load": loads, "bar_s": BAR_S, "seconds": results}
        out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["overlap", "async"])
    parser.add_argument("--out", type=Path, help="a path without suffix; .json and .md are written")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in args.modes}
    loads = []
    for i in range(args.repeats):
        for mode, took in results.items():
            loads.append(os.getloadavg()[0])
            took.append(restart(mode))
            last = {phase: round(seconds, 1) for phase, seconds in took[-1].items()}
            print(f"{i + 1} of {args.repeats}, {mode}: {last}, load {loads[-1]:.1f}", flush=True)
        keep(args.out, results, loads)
    print("\nseconds from `miles run --resume`, medians\n\n" + table(results))


if __name__ == "__main__":
    main()
