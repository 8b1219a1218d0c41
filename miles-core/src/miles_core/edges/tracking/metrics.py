"""metrics.jsonl, one JSON object a step, and the same numbers in memory for the curves."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..room import Room, Tail, sync
from .files import append, explained

NAME = "metrics.jsonl"
WHAT = "the metrics of the run"


@dataclass(slots=True)
class Series:
    """One metric over the steps that reported it, 16 bytes a number: a run of 100,000 steps fits in memory."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    gaps: int = 0  # steps that reported a number which was not finite


class History:
    """Every metric of a run by name, in the order in which the names first appeared."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.last = -1  # the newest step added

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one step; what is not a finite number counts as a gap of its series."""
        self.last = step
        for name, value in metrics.items():
            series = self.series.setdefault(name, Series())
            if isinstance(value, int | float) and math.isfinite(value):
                series.steps.append(step)
                series.values.append(value)
            else:
                series.gaps += 1

    def get(self, name: str) -> Series | None:
        """The series of that name, or None where no step reported a finite number."""
        series = self.series.get(name)
        return series if series is not None and series.values else None

    def ends(self, name: str) -> tuple[float, float] | None:
        """The first and the last value, or None."""
        series = self.get(name)
        return (series.values[0], series.values[-1]) if series else None

    def total(self, name: str) -> float:
        """The sum over the training steps; step 0, an evaluation before them, is not one."""
        series = self.series.get(name, Series())
        return math.fsum(value for step, value in zip(series.steps, series.values, strict=True) if step > 0)


def read(path: Path) -> History:
    """The whole lines of a metrics.jsonl. Raises OSError when it cannot be read."""
    history = History()
    with path.open("rb") as file:
        for line in file:
            if (row := _row(line)) and row["step"] > history.last:
                history.add(row.pop("step"), row)
    return history


class MetricsFile:
    """metrics.jsonl, open for appending. A line is on its way to the disk when ``append`` returns."""

    def __init__(self, run_dir: Path, step: int, room: Room) -> None:
        """Open the file of a run of which ``step`` steps are done; ``room.say`` hears what had to be dropped.

        Lines of later steps, which will run again, and half a line left by a crash are cut away first. Raises OSError
        naming the file when the folder cannot be written.
        """
        self.path = run_dir / NAME
        self.history = History()
        with explained(self.path, WHAT):
            if self.path.exists():
                for text in room.insist(self.path, lambda full: self._cut(step)):
                    room.say(text)
            self._file = Tail(self.path, room)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the line of one step, on a full disk as soon as there is room.

        Raises OSError naming the file; the file then still ends with a whole line.
        """
        row = {"step": step, "time_s": metrics.get("time_s"), **metrics}
        row = {name: _plain(value) for name, value in row.items() if value is not None}
        with explained(self.path, WHAT):
            append(self._file, json.dumps(row, allow_nan=False).encode() + b"\n")
        del row["step"]
        self.history.add(step, row)

    def sync(self) -> None:
        """Make every line so far outlive a power cut. Raises OSError naming the file."""
        with explained(self.path, WHAT):
            self._file.sync()
            sync(self.path.parent)  # that there is a file of this name

    def close(self) -> None:
        self._file.close()

    def _cut(self, step: int) -> list[str]:
        """Keep the lines of steps up to ``step``, each step once; none when starting over, evaluation included.

        Returns what was dropped and what is missing, in words.
        """
        self.history = History()
        torn: list[int] = []
        later = 0
        fresh = self.path.with_name(f"{NAME}.new")
        with self.path.open("rb") as old, fresh.open("wb") as new:
            for number, line in enumerate(old, 1):
                row = _row(line)
                if row is None:
                    torn.append(number)
                elif 0 < step >= row["step"] > self.history.last:
                    new.write(line.rstrip(b"\n") + b"\n")
                    self.history.add(row.pop("step"), row)
                else:
                    later += 1
            new.flush()
            os.fsync(new.fileno())
        os.replace(fresh, self.path)
        told = []
        if torn:
            lines = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
            told.append(f"{self.path}: dropped line {lines}, not whole: the process that wrote it was cut short")
        if later:
            told.append(f"{self.path}: dropped {later} lines of steps after {step}, which run again")
        if step > self.history.last:
            lost = f"{self.history.last + 1} to {step}"
            told.append(f"{self.path}: no line for the steps {lost}: lost with the process before")
        return told


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a dict with an integer step, or None where it is not whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _plain(value: float) -> float | None:
    """What JSON can hold: scalars of other libraries become floats, what is not finite becomes null."""
    number = value if type(value) in (int, float) else float(value)
    return number if math.isfinite(number) else None
