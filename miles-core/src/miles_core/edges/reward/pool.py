"""Processes that score, one call a group; one that hangs or dies is replaced, and the sample at fault is named."""

from __future__ import annotations

import asyncio
import pickle
import struct
import subprocess
import sys
from typing import Any

from ...types import Sample
from .child import Outcome
from .kinds import Scorer

GRACE_S = 2.0  # beyond the budgets, before a process is taken to hang where no signal reaches it
START_S = 60.0

__all__ = ["Outcome", "Pool"]


class Pool:
    def __init__(self, scorers: dict[str, Scorer], workers: int, max_tokens: int) -> None:
        self._setup = (scorers, max_tokens)
        self._children = [_Child(self._setup) for _ in range(workers)]
        self._idle: asyncio.Queue[_Child] | None = None  # made in the loop that uses it

    async def score(self, name: str, scorer: Scorer, samples: list[Sample]) -> list[Outcome]:
        """One outcome a sample, in order: (value, None), or (None, why there is none)."""
        if self._idle is None:
            self._idle = asyncio.Queue()
            for child in self._children:
                self._idle.put_nowait(child)
        child = await self._idle.get()
        try:
            answer = await child.ask((name, samples), scorer.budget_s * len(samples) + GRACE_S)
            if not isinstance(answer, str):
                return answer
            if len(samples) == 1:
                return [(None, answer)]
            alone: list[Outcome] = []
            for sample in samples:  # which one was it?
                one = await child.ask((name, [sample]), scorer.budget_s + GRACE_S)
                alone += [(None, one)] if isinstance(one, str) else one
            return alone
        finally:
            self._idle.put_nowait(child)


class _Child:
    """One process, started again when it is needed after it was ended."""

    def __init__(self, setup: Any) -> None:
        self._setup, self._process = setup, _start(setup)
        self._ready = False

    async def ask(self, request: Any, seconds: float) -> list[Outcome] | str:
        """The answer; or in words why there is none, and the process is another one from then on."""
        try:
            if not self._ready:
                await asyncio.wait_for(asyncio.to_thread(self._receive), START_S)
                self._ready = True
            answer: list[Outcome] = await asyncio.wait_for(asyncio.to_thread(self._exchange, request), seconds)
            return answer
        except TimeoutError:
            self._restart()
            return f"ran over its budget, where nothing but ending its process helped, after {seconds - GRACE_S:g} s"
        except (EOFError, OSError):
            status = self._process.wait()
            self._restart()
            return f"ended its process with status {status}"
        except BaseException:  # cancelled between question and answer: the next one must not get this answer
            self._restart()
            raise

    def _exchange(self, request: Any) -> Any:
        data = pickle.dumps(request, protocol=5)
        assert self._process.stdin
        self._process.stdin.write(struct.pack("<Q", len(data)) + data)
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        from .child import read

        assert self._process.stdout
        return read(self._process.stdout)  # type: ignore[arg-type]

    def _restart(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process, self._ready = _start(self._setup), False


def _start(setup: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "miles_core.edges.reward.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    data = pickle.dumps(setup, protocol=5)
    assert process.stdin
    process.stdin.write(struct.pack("<Q", len(data)) + data)
    process.stdin.flush()
    return process
