"""Who may run ahead of whom, and where the time of a step went."""

from __future__ import annotations

from dataclasses import dataclass


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


def sampling(waves: list[tuple[float, float]], streaming: bool) -> dict[str, float]:
    """Seconds of sampling and rewarding from those of waves: until all was sampled, and until it was rewarded.

    Waves follow one another; streaming they overlap, and their mean says how long a group takes.
    """
    parts = len(waves) if waves and streaming else 1
    sampled, done = (sum(wave[i] for wave in waves) / parts for i in (0, 1))
    return {"time/sample": sampled, "time/reward": done - sampled}


def times(metrics: dict[str, float], waited: float, wall: float, ahead: float, turns: bool) -> dict[str, float]:
    """Where a step's ``wall`` seconds went. ``time/ahead`` of the training was before them; ``time/other``, the
    driver's own, is none of the phases. In ``turns`` what was waited for is sampling, rewarding, and nothing else.
    """
    phases = sum(metrics.get(f"time/{phase}", 0.0) for phase in ("train", "sync", "eval", "checkpoint"))
    other = wall + ahead - waited - phases
    if turns:
        other += waited - metrics.get("time/sample", 0.0) - metrics.get("time/reward", 0.0)
    spent = {"time/step": wall, "time/wait": waited, "time/ahead": ahead, "time/other": other}
    return spent | {"tokens_per_s": metrics.get("rollout/tokens", 0.0) / wall}
