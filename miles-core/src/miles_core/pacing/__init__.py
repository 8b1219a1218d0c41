"""Who may run ahead of whom, and where the time of a step went."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .watched import WatchedCluster as WatchedCluster


@dataclass(slots=True)
class Admission:
    """How many groups may be sampled now, so that none is too old when its turn to be trained on comes.

    Of ``version`` weights, ``most`` = (version + 1 + staleness) x groups may ever have been kept or be under way. In
    turns, and overlapped, a step's groups are sampled in waves, each begun when all of the one before it is back: a
    run that is resumed samples the very same. Streaming, whoever is done makes room.
    """

    groups: int  # a step trains on
    steps: int  # of the run
    staleness: int
    streaming: bool
    version: int = 0
    used: int = 0  # groups that were kept, whether trained on or queued
    flying: int = 0
    draining: bool = False  # weights are about to move, and nothing is to be under way then
    ripe: dict[int, int] = field(default_factory=dict)  # groups in the queue: id, and the oldest version in it
    wanted: int = 0  # the step whose groups the trainer waits for; 0 while it has them
    too_old: int = 0  # groups that came too late, since that was asked last
    full_s: float = 0.0  # for which a group waited for room in the queue, since then
    clock: Callable[[], float] = time.perf_counter
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.clock())

    def fly(self, groups: int) -> None:
        """So many are under way from now on."""
        self.watch.look(self.clock(), self.flying)
        self.flying = groups

    @property
    def room(self) -> int:
        most = min(self.steps, self.version + 1 + self.staleness) * self.groups
        if self.streaming:
            return 0 if self.draining else max(most - self.used - self.flying, 0)
        return 0 if self.flying else min(most - self.used, self.groups - self.used % self.groups)

    @property
    def rests(self) -> bool:
        """Nothing is under way, and nothing will be before the weights move."""
        return not (self.flying or self.room)

    def land(self, id: int, oldest: int) -> None:
        """A group is in the queue, the oldest of its tokens of that version."""
        self.ripe[id] = oldest
        self.used += 1

    def due(self, step: int) -> bool:
        """Whether there is anything to ``weed`` or to ``pick``."""
        return len(self.ripe) >= self.groups or bool(self._old(step))

    def weed(self, step: int) -> list[int]:
        """What is too old for a step: it is in the queue no more, and others may be sampled in its place."""
        old = self._old(step)
        for id in old:
            del self.ripe[id]
        self.used -= len(old)
        self.too_old += len(old)
        return old

    def pick(self, step: int) -> list[int]:
        """A step's groups, those of the oldest weights first; none while there are too few, or any is too old."""
        self.wanted = step
        if len(self.ripe) < self.groups or self._old(step):
            return []
        self.wanted = 0
        ids = sorted(self.ripe, key=lambda id: (self.ripe[id], id))[: self.groups]
        for id in ids:
            del self.ripe[id]
        return ids

    def needs(self) -> int | None:
        """See ``Queue.put``. The trainer that has a step's groups takes others when it is done with them; one that
        waits for groups takes none before there are enough. Weights that wait for all to come back wait for ever
        where one of these waits for the trainer.
        """
        if self.draining:
            return None
        return self.groups if self.wanted and not self.due(self.wanted) else 0

    def _old(self, step: int) -> list[int]:
        return [id for id, oldest in self.ripe.items() if step - 1 - oldest > self.staleness]

    def sampling(self, waves: list[tuple[float, float]]) -> dict[str, float]:
        """What was sampled since this was asked last, for the metrics.

        Seconds of sampling and rewarding are those of ``waves``: until all was sampled, and until it was rewarded.
        Waves follow one another; streaming they overlap, and their mean says how long a group takes.
        """
        parts = len(waves) if waves and self.streaming else 1
        sampled, done = (sum(wave[i] for wave in waves) / parts for i in (0, 1))
        self.watch.look(self.clock(), self.flying)
        seen, self.watch = self.watch, Watch(self.watch.at)
        late, self.too_old, full_s, self.full_s = self.too_old, 0, self.full_s, 0.0
        return {
            "staleness/too_old": float(late),
            "time/queue_full": full_s,
            "time/sample": sampled,
            "time/reward": done - sampled,
            "utilization/queued": float(len(self.ripe)),
            "utilization/in_flight": seen.flying_s / seen.seconds if seen.seconds else 0.0,
            "utilization/rollouts": seen.busy,
        }


@dataclass(slots=True)
class Watch:
    """How much was under way, groups or requests, over a stretch of time."""

    at: float  # when it was looked at last
    seconds: float = 0.0
    busy_s: float = 0.0  # of those, with anything under way at all
    flying_s: float = 0.0  # as many as there were, times seconds

    def look(self, now: float, flying: int) -> None:
        """``flying`` were under way until ``now``."""
        passed, self.at = now - self.at, now
        self.seconds += passed
        self.busy_s += passed if flying else 0.0
        self.flying_s += passed * flying

    @property
    def busy(self) -> float:
        """The share of the time in which anything was under way."""
        return self.busy_s / self.seconds if self.seconds else 0.0


def moved(ranks: list[dict[str, float]], shares: list[Any]) -> dict[str, float]:
    """Metrics of moving weights: what ranks said of what they sent, and engines of the time since the last ones came.

    Engines that do not say what share of it they had requests running count for nothing.
    """
    told = [share for share in shares if isinstance(share, float)]
    busy = {"utilization/engines": sum(told) / len(told)} if told else {}
    return {"sync/bytes": sum(rank.get("bytes", 0.0) for rank in ranks)} | busy


def times(metrics: dict[str, float], waited: float, wall: float, ahead: float, turns: bool) -> dict[str, float]:
    """Where a step's ``wall`` seconds went. ``time/ahead`` of the training was before them; ``time/other``, the
    driver's own, is none of the phases. In ``turns`` what was waited for is sampling, rewarding, and nothing else.
    """
    phases = sum(metrics.get(f"time/{phase}", 0.0) for phase in ("train", "sync", "eval", "checkpoint"))
    other = wall + ahead - waited - phases
    if turns:
        other += waited - metrics.get("time/sample", 0.0) - metrics.get("time/reward", 0.0)
    spent = {"time/step": wall, "time/wait": waited, "time/ahead": ahead, "time/other": other}
    spent["utilization/trainer"] = metrics.get("time/train", 0.0) / (wall + ahead)
    return spent | {"tokens_per_s": metrics.get("rollout/tokens", 0.0) / wall}
