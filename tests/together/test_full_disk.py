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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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

    def __init__(self, runs: Any, *keys: str) -> None:
        self.folder: Path = runs.folder / "small" / "run"
        sets = [arg for key in keys for arg in ("--set", key)]
        self.process = runs.start("small/run", "--set", "mode=async", "--set", "tracking.console=plain", *sets)
        self.said: list[str] = []
        for stream in (self.process.stdout, self.process.stderr):
            Thread(target=self._hear, args=(stream,), daemon=True).start()

    def _hear(self, stream: Any) -> None:
        for line in stream:
            self.said.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.said)

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


@pytest.mark.parametrize(
    "every, leave, what",
    [
        (STEPS, 0, ""),  # whatever is written next: a line of the ledger or of the metrics, or a group
        (2, 1, "the checkpoint could not be written"),
        (STEPS, 15, ""),  # of the last checkpoint and the trained model one fits
    ],
)
def test_a_run_pauses_while_its_disk_is_full_and_nothing_is_lost(
    runs: Any, small: Path, every: int, leave: int, what: str
) -> None:
    with Run(runs, f"steps={STEPS}", f"checkpoint.every={every}") as run:
        run.until(lambda: run.steps() > 2)
        filler = fill(small, leave << 20)
        run.until(lambda: WAITS in run.text and what in run.text)
        time.sleep(5)  # until nothing more can be done without the disk
        before = run.steps()
        time.sleep(5)
        assert run.steps() == before <= STEPS + (leave > 1) and run.process.poll() is None, run.text
        filler.unlink()
        assert run.end() == 0, run.text
    assert GOES_ON in run.text and not re.search("Traceback|Error", run.text)
    whole(runs, STEPS)
    saved = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert saved == [f"step-{step:06d}" for step in range(every, STEPS + 1, every)][-2:]
    assert (run.folder / "report.html").is_file() and len(runs.weights("small/run")) > 10
    again = runs.run("small/run", "--resume", "--set", "mode=async", "--set", f"steps={STEPS + 2}")
    assert f"going on after step {STEPS}" in again.stdout
    whole(runs, STEPS + 2)


@pytest.mark.parametrize("leave, sent", [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_run_that_waits_for_room_can_be_ended_and_goes_on_later(
    runs: Any, small: Path, leave: int, sent: signal.Signals
) -> None:
    with Run(runs, f"steps={STEPS}") as run:
        run.until(lambda: any((run.folder / "checkpoints").glob("step-*")))
        filler = fill(small, leave << 20)
        run.until(lambda: WAITS in run.text)
        time.sleep(2)
        run.process.send_signal(sent)
        began = time.monotonic()
        assert run.end() != 0 and time.monotonic() - began < 40, run.text
    filler.unlink()
    again = runs.run("small/run", "--resume", "--set", "mode=async", "--set", f"steps={STEPS}")
    assert "going on after step" in again.stdout
    whole(runs, STEPS)
