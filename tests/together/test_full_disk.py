"""A disk that fills while a run goes on: it pauses, says so, and goes on when there is room."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mounted import mounted

pytestmark = pytest.mark.timeout(900)

MILES = str(Path(sys.executable).with_name("miles"))
STEPS = 8
PATIENCE = 240  # seconds for what comes at all
WAITS, GOES_ON = "the run waits until there is room", "the run goes on"


@pytest.fixture
def small(runs: Any) -> Iterator[Path]:
    """A file system in the folder of the runs, with room for three checkpoints and the model."""
    with mounted(runs.folder / "small", "64m") as folder:
        yield folder


class Run:
    """A run in another process, and what it has said so far."""

    def __init__(self, runs: Any, *keys: str, resume: bool = False) -> None:
        self.folder: Path = runs.folder / "small" / "run"
        sets = [arg for key in ("mode=async", "tracking.console=plain", *keys) for arg in ("--set", key)]
        self.process = runs.start("small/run", *sets, *["--resume"] * resume)
        self.said: list[str] = []
        for stream in (self.process.stdout, self.process.stderr):
            Thread(target=self._hear, args=(stream,), daemon=True).start()

    def _hear(self, stream: Any) -> None:
        for line in stream:
            self.said.append(line.rstrip())

    @property
    def text(self) -> str:
        return self.since(0)

    def since(self, line: int) -> str:
        return "\n".join(self.said[line:])

    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"it ended\n{self.text}"
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all room but ``leave`` bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave) > 0:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
            except OSError:  # the run was quicker
                time.sleep(0.01)
    return filler


def whole(runs: Any, steps: int) -> None:
    """Every step is told of once, and every prompt accounted for."""
    done = subprocess.run([MILES, "audit", "small/run"], cwd=runs.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in runs.metrics("small/run")] == list(range(steps + 1))


def paused(run: Run, leave: int, most: int, what: str = "") -> int:
    """The disk is full until the run has waited for room a while, at no more than ``most`` lines of metrics; what it
    says of this begins at the line returned."""
    heard = len(run.said)
    filler = fill(run.folder.parent, leave << 20)
    run.until(lambda: WAITS in run.since(heard) and what in run.since(heard))
    time.sleep(3)  # until nothing more can be done without the disk
    before = run.steps()
    time.sleep(3)  # some steps
    assert run.steps() == before <= most and run.process.poll() is None, run.text
    filler.unlink()
    return heard


def ended_well(runs: Any, run: Run, heard: int, steps: int, saved: list[int]) -> None:
    assert run.end() == 0, run.text
    assert GOES_ON in run.since(heard) and not re.search("Traceback|Error", run.text)
    whole(runs, steps)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [f"step-{n:06d}" for n in saved]
    assert (run.folder / "report.html").is_file() and len(runs.weights("small/run")) > 10


@pytest.mark.slow
def test_a_run_pauses_while_its_disk_is_full_and_nothing_is_lost(runs: Any, small: Path) -> None:
    """Whatever it was about to write, and it can be resumed after each."""
    with Run(runs, f"steps={STEPS}", f"checkpoint.every={STEPS}") as run:
        run.until(lambda: run.steps() > 2)
        heard = paused(run, 0, STEPS)  # at what is written next: a line of the ledger or of the metrics, or a group
        run.until(lambda: GOES_ON in run.since(heard))
        heard = paused(run, 15, STEPS + 1)  # of the last checkpoint and the trained model one fits
        ended_well(runs, run, heard, STEPS, [STEPS])
    with Run(runs, f"steps={2 * STEPS}", "checkpoint.every=2", resume=True) as run:
        run.until(lambda: run.steps() > STEPS + 2)
        heard = paused(run, 1, 2 * STEPS, "the checkpoint could not be written")
        ended_well(runs, run, heard, 2 * STEPS, [2 * STEPS - 2, 2 * STEPS])
    assert f"going on after step {STEPS}" in run.text
    again = runs.run("small/run", "--resume", "--set", "mode=async", "--set", f"steps={2 * STEPS + 2}")
    assert f"going on after step {2 * STEPS}" in again.stdout
    whole(runs, 2 * STEPS + 2)


def ended(run: Run, lines: int, leave: int, sent: signal.Signals) -> None:
    """By a signal, while it waits for room; it has a checkpoint and more than that many lines of metrics by then."""
    with run:
        run.until(lambda: run.steps() > lines and any((run.folder / "checkpoints").glob("step-*")))
        filler = fill(run.folder.parent, leave << 20)
        run.until(lambda: WAITS in run.text)
        time.sleep(2)
        run.process.send_signal(sent)
        began = time.monotonic()
        assert run.end() != 0 and time.monotonic() - began < 40, run.text
    filler.unlink()


@pytest.mark.chaos
def test_a_run_that_waits_for_room_can_be_ended_and_goes_on_later(runs: Any, small: Path) -> None:
    """Without any room, and then without enough for a checkpoint."""
    steps = f"steps={2 * STEPS}"
    ended(Run(runs, steps), 0, 0, signal.SIGTERM)
    again = Run(runs, steps, resume=True)
    ended(again, STEPS, 1, signal.SIGINT)
    assert "going on after step" in again.text
    last = runs.run("small/run", "--resume", "--set", "mode=async", "--set", steps)
    assert "going on after step" in last.stdout
    whole(runs, 2 * STEPS)
