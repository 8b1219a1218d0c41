"""How many requests a server has, and in how much of the time it had any: it is looked at once a second."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic

from ...pacing import Watch
from ..protocols import EngineError
from .calls import QUICK_S, Caller

PATIENCE_S = 1.0  # for an answer: a scheduler in the midst of a long prompt may have none


async def requests(call: Caller, timeout: float = QUICK_S) -> dict[str, int]:
    """Requests ``running`` and ``waiting`` at a server. Raises EngineError."""
    loads = (await call.get("/v1/loads", timeout))["loads"]
    return {kind: sum(load[f"num_{kind}_reqs"] for load in loads) for kind in ("running", "waiting")}


class Use:
    """What is found at a look counts for the time since the one before; one without an answer is none."""

    def __init__(self) -> None:
        self._watch, self._running = Watch(monotonic()), 0

    async def look(self, call: Caller) -> None:
        with suppress(EngineError):
            self._running = (await requests(call, PATIENCE_S))["running"]
            self._watch.look(monotonic(), self._running)

    def halt(self) -> None:
        """From now on it writes no token, since its weights are moved, until ``share`` is asked."""
        self._watch.look(monotonic(), self._running)

    def share(self) -> float:
        """The share of the time since it was asked last in which there were requests running."""
        seen, self._watch = self._watch, Watch(monotonic())
        seen.look(self._watch.at, 0)
        return seen.busy
