"""What the processes of each role did with their time, and which of two sides waits for the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .metrics import History

if TYPE_CHECKING:
    from ...config import RunConfig

SEVERAL = ("sample", "reward")  # what a process does many times at once
RECENT = 20  # steps that advice is founded on
WAITS, RESTS = 0.25, 0.5  # shares of waiting, and of the groups that may be ahead, from which on they are worth telling


@dataclass(slots=True)
class Usage:
    """Seconds of each role at each of its doings, over all processes of the role."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    watched_s: float = 0.0  # how long the run was watched by processes before this one
    _first: float | None = None
    _last: float = 0.0

    def add(self, process: str, doing: str, began: float, ended: float) -> None:
        role, _, number = process.rpartition("-")
        role = role if number.isdigit() and role else process
        spent = self.seconds.setdefault(role, {})
        spent[doing] = spent.get(doing, 0.0) + ended - began
        self.processes[role] = max(self.processes.get(role, 1), int(number) + 1 if number.isdigit() else 1)
        self._first = began if self._first is None else min(self._first, began)
        self._last = max(self._last, ended)

    @property
    def elapsed(self) -> float:
        return self.watched_s + (self._last - self._first if self._first is not None else 0.0)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """A role, a doing, and how much of it: a share of the time, or how many at once in the mean."""
        for role, spent in sorted(self.seconds.items()):
            whole, several = self.elapsed * self.processes[role], f" x {self.processes[role]}"
            name = role + (several if self.processes[role] > 1 else "")
            for doing, seconds in sorted(spent.items(), key=lambda item: -item[1]):
                mean = seconds / whole if whole else 0.0
                yield name, doing, f"{mean:.1f} at once" if doing in SEVERAL else f"{mean:.1%}"

    def state(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "processes": self.processes, "watched_s": self.elapsed}

    def restore(self, state: dict[str, Any]) -> None:
        """Add what processes before this one saw."""
        for role, spent in state["seconds"].items():
            mine = self.seconds.setdefault(role, {})
            for doing, seconds in spent.items():
                mine[doing] = mine.get(doing, 0.0) + seconds
            self.processes[role] = max(self.processes.get(role, 1), state["processes"][role])
        self.watched_s += state["watched_s"]


def advice(history: History, run: RunConfig) -> tuple[str, str]:
    """The slower side, "engines" or "training", and what to do, with the numbers.

    Nothing where neither waits much for the other, or where they take turns.
    """
    if not (run.max_staleness and run.placement.engines) or run.placement.layout == "colocate":
        return "", ""
    last = {name: _recent(history, name) for name in ("time/step", "time/wait", "utilization/in_flight")}
    if any(len(values) < RECENT for values in last.values()):
        return "", ""
    waited = sum(last["time/wait"]) / sum(last["time/step"])
    ahead = run.batch.groups * run.max_staleness  # beside those that are being trained on
    flying, place = sum(last["utilization/in_flight"]) / RECENT, run.placement
    most = ahead + run.batch.groups  # while training waits for its own
    told = f"over {RECENT} steps training waited {waited:.0%} of the time; {flying:.1f} of {most} groups were under way"
    more = "more" if place.layout == "cpu" else "more GPUs"
    if waited >= WAITS:
        return (
            "engines",
            f"{told}: engines are the slower side; give them {more} (now placement.engines = {place.engines})",
        )
    if waited < WAITS / 5 and flying < RESTS * ahead:
        return (
            "training",
            f"{told}: training is the slower side; give it {more} (now placement.trainers = {place.trainers})",
        )
    return "", ""


def _recent(history: History, name: str) -> list[float]:
    series = history.get(name)
    return list(series.values[-RECENT:]) if series else []
