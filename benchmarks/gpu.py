"""The pair of SGLang and Megatron on real GPUs, each number beside its ceiling, measured in the same process.

    python benchmarks/gpu.py --out benchmarks/results/gpu
    python benchmarks/gpu.py --only rollout sync
    python benchmarks/gpu.py --side-by-side

writes ``gpu.md`` and ``gpu.json``, anew after every row; rows found there that are not measured now stay. Those that
need the same model or server share a process. When a row fails it is said in its place, and those that it kept from
being measured go on in another process. Models have random weights; nothing is fetched. With ``--side-by-side`` every
GPU is kept busy: jobs share the host, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Condition, Event
from typing import Any

from on_gpu.table import Report, Row, known, line, read, reporter, write

SGLANG = Path(__file__).parents[1] / "tests" / "gpu" / "sglang.toml"  # with which kernels a server runs offline


@dataclass(frozen=True)
class Job:
    """Rows that one process measures, in this order, and how long that may take."""

    rows: tuple[str, ...]
    limit_s: float
    gpus: int = 1


JOBS = {
    "serving": Job(("rollout", "logprobs", "sync"), 400),
    "0.6B": Job(("training", "mfu-0.6B"), 200),
    "4B": Job(("mfu-4B",), 200),
    "0.6B-te": Job(("mfu-0.6B-te",), 200),
    "4B-te": Job(("mfu-4B-te",), 200),
    "colocate": Job(("step", "checkpoint", "step-100M"), 500),
    "learning": Job(("learning",), 600),
    "nccl": Job(("nccl",), 400, gpus=2),
    "layouts": Job(("split",), 700, gpus=2),
}
ROWS = [row for job in JOBS.values() for row in job.rows]
KEPT = Path(__file__).parent / "results"
LOOK_S = 1.0  # between two looks at what a process has reported
ENDING = Event()  # told to end: with all that was started
Keep = Callable[[list[Row]], None]


def measure(name: str, rows: list[str], work: Path, sglang: Path, report: Report) -> None:
    """Do one job, in this process."""
    table: dict[str, Any] = tomllib.loads(sglang.read_text())["sglang"]
    from on_gpu import broadcast, runs, serving, training

    doing: dict[str, Callable[[], None]] = {
        "serving": partial(serving.job, rows, work, table, report),
        "0.6B": partial(training.job, "0.6B", "local", rows, work, report),
        "4B": partial(training.job, "4B", "local", rows, work, report),
        "0.6B-te": partial(training.job, "0.6B", "transformer_engine", rows, work, report),
        "4B-te": partial(training.job, "4B", "transformer_engine", rows, work, report),
        "colocate": partial(runs.step, rows, work, sglang, report),
        "learning": partial(runs.learning, work, sglang, KEPT, report),
        "nccl": partial(broadcast.job, work, table, report),
        "layouts": partial(runs.layouts, work, sglang, report),
    }
    doing[name]()


@dataclass(frozen=True)
class Place:
    """Where jobs run, and with what."""

    work: Path
    sglang: Path
    gpus: tuple[str, ...]  # the job's own, as CUDA_VISIBLE_DEVICES has them


def ask(name: str, rows: list[str], at: Place, keep: Keep) -> tuple[list[Row], str]:
    """What a process of its own reports of a job, and why it ended early, if it did. ``keep`` is told meanwhile."""
    work = at.work
    told, errors = (work / f"{name}-{time.time_ns()}.{kind}" for kind in ("jsonl", "log"))
    command = [sys.executable, str(Path(__file__).absolute()), "--job", name, "--only", *rows]
    command += ["--work", str(work), "--sglang", str(at.sglang), "--report", str(told)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(at.gpus)}
    why = ""
    with errors.open("w") as file:  # no pipe: what a job leaves behind might hold it open
        process = subprocess.Popen(command, stderr=file, start_new_session=True, env=env)
        deadline = time.monotonic() + JOBS[name].limit_s
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline and not ENDING.is_set():
                time.sleep(LOOK_S)
                keep(read(told))
            if status is None:
                why = f"not done within {JOBS[name].limit_s:g} s"
        finally:
            with suppress(ProcessLookupError):  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = errors.read_text(errors="replace")
    if status or why:
        print(said[-6000:], file=sys.stderr, flush=True)
        last = [text for text in said.splitlines() if text and not text.startswith(" ")]
        why = why or f"status {status}: {last[-1] if last else 'it said nothing'}"
    return read(told), why


def finish(name: str, wanted: list[str], at: Place, keep: Keep) -> list[Row]:
    """Every wanted row of a job: what keeps one from being measured keeps no other. ``keep`` is told of those so far.

    Where two processes in a row report nothing, the others are given up, too.
    """
    done: list[Row] = []
    left, barren = [row for row in JOBS[name].rows if row in wanted], 0
    while left and not ENDING.is_set():
        before = done
        rows, why = ask(name, left, at, lambda found, before=before: keep(before + found))
        done, barren = done + rows, 0 if rows else barren + 1
        reported = [row for row in left if row in {found.name for found in rows}]
        left = [row for row in left if row not in reported]
        if not (why or left):
            break
        lost = [left.pop(0) if left else reported[-1]]  # the row that it was at; its last one may not be whole
        if barren == 2:
            lost, left = lost + left, []
        done += [Row(row, f"{row}: not measured", note=why or "nothing was reported") for row in lost]
    return done


def machine() -> dict[str, str]:
    import torch

    names = ("torch", "megatron-core", "sglang", "transformer-engine", "transformers", "ray")
    found = {"GPU": torch.cuda.get_device_name(), "GPUs": str(torch.cuda.device_count())}
    found["python"] = platform.python_version()
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--sglang", type=Path, default=SGLANG, help="a TOML file with the server's arguments")
    parser.add_argument("--work", type=Path, help="where models and runs are kept; a folder that is deleted otherwise")
    parser.add_argument("--side-by-side", action="store_true", help="as many jobs at once as there are GPUs for")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        measure(args.job, args.only, args.work, args.sglang, reporter(args.report))
        return
    signal.signal(signal.SIGTERM, _end)
    import torch

    if not torch.cuda.is_available():
        print("needs a GPU: nothing was measured")
        return
    with tempfile.TemporaryDirectory(prefix="miles-bench-") as folder:
        work = (args.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        table(args, work)


def _end(*_: Any) -> None:
    ENDING.set()  # another job of a thread of the pool is not begun, and those that run are killed
    sys.exit(143)


def visible(count: int) -> list[str]:
    """The GPUs that this process may use, by the names that its children know them by."""
    return list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) or [str(i) for i in range(count)]


def table(args: argparse.Namespace, work: Path) -> None:
    """Job after job, or on GPUs of their own side by side; what is known so far is on disk after each row."""
    import torch

    out, where, count = args.out, machine(), torch.cuda.device_count()
    before = known(out, where) if out else []
    found: dict[str, list[Row]] = {}
    jobs = {name: [row for row in job.rows if row in args.only] for name, job in JOBS.items()}
    free, changed = visible(count), Condition()

    def keep(name: str, rows: list[Row]) -> None:
        with changed:
            found[name] = rows
            new = [row for rows in found.values() for row in rows]
            measured = {row.name for row in new}
            if out:
                whole = new + [row for row in before if row.name not in measured]
                write(out, sorted(whole, key=lambda row: ROWS.index(row.name)), where)

    def measure(name: str) -> None:
        job, wanted = JOBS[name], jobs[name]
        if ENDING.is_set():
            return
        if count < job.gpus:
            return keep(name, [Row(row, f"{row}: not measured", note="needs two GPUs") for row in wanted])
        with changed:
            changed.wait_for(lambda: len(free) >= job.gpus)
            mine = tuple(free.pop(0) for _ in range(job.gpus))
        try:
            keep(name, finish(name, wanted, Place(work, args.sglang.absolute(), mine), partial(keep, name)))
        finally:
            with changed:
                free[:] = sorted([*free, *mine])
                changed.notify_all()

    with ThreadPoolExecutor(count if args.side_by_side else 1) as pool:
        list(pool.map(measure, [name for name, rows in jobs.items() if rows]))
    print("\n" + "\n".join(line(row) for name in JOBS for row in found.get(name, [])))


if __name__ == "__main__":
    main()
