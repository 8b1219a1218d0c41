"""Processes that score, one call a group; one that hangs or dies is replaced, and the sample at fault is named."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

from ...types import Group
from .child import HEAD, frame
from .kinds import Base, Outcome

PATIENCE_S = 0.5  # that a group waits for a free process before one more is started
GRACE_S = 1.0  # beyond a sample's budget, before its process is taken to hang where no signal reaches it
DEATHS = 3  # of processes in a row at one sample, before it is at fault, and not whoever killed them
START_S = 120.0  # for a process to start and to import what its scorers need

__all__ = ["Outcome", "Pool"]


class Pool:
    """At most ``workers`` processes. The first starts at once, the others when groups have to wait.

    Use it in one event loop. Its processes end with the thread that they were started from.
    """

    def __init__(self, scorers: dict[str, Base], workers: int, max_tokens: int) -> None:
        self._setup, self._most = (scorers, max_tokens), workers
        self._idle: asyncio.Queue[_Child] = asyncio.Queue()
        self._children: set[_Child] = set()
        self._waiting = 0
        self._idle.put_nowait(self._start())

    async def score(self, name: str, scorer: Base, group: Group) -> list[Outcome]:
        """One outcome a sample, in order: (value, None), or (None, why there is none).

        Where ``scorer`` stops the run on an error, samples after the first one at fault are not scored.
        """
        outcomes: list[Outcome] = []
        left, deaths = group.samples, 0
        while left:
            child = await self._take()
            try:
                request = frame((name, group.id, [scorer.view(sample) for sample in left]))
                found, fault = await child.ask(request, name, len(left), scorer.budget_s)
                died = not child.alive
            except BaseException:  # cancelled: the next group must not get this one's outcomes
                self._end(child)
                raise
            outcomes += found
            if fault is None:
                self._idle.put_nowait(child)
                return outcomes
            deaths = 1 if found else deaths + 1
            if died and deaths < DEATHS:  # out of memory, perhaps, or killed: another may well score it
                left = left[len(found) :]
                self._end(child)
                continue
            lost = len(left) - len(found) if scorer.on_error == "stop" or child.whole.get(name) else 1
            outcomes += [(None, fault)] * lost
            left, deaths = left[len(found) + lost :], 0
            self._end(child)
        return outcomes

    def close(self) -> None:
        """End every process; nothing can be scored from then on."""
        self._most = 0
        for child in list(self._children):
            self._end(child)

    async def _take(self) -> _Child:
        self._waiting += 1
        try:
            while True:
                patience = PATIENCE_S if self._children else 0.0
                try:
                    async with asyncio.timeout(patience if len(self._children) < self._most else None):
                        child = await self._idle.get()
                except TimeoutError:
                    if len(self._children) < self._most:  # else somebody who waited too was quicker
                        return self._start()
                    continue
                if child.alive:
                    return child
                self._end(child)  # it died while nobody asked it anything
        finally:
            self._waiting -= 1

    def _start(self) -> _Child:
        child = _Child(self._setup)
        self._children.add(child)
        return child

    def _end(self, child: _Child) -> None:
        self._children.discard(child)
        child.end()
        if self._waiting and len(self._children) < self._most:  # or they would wait for a process that never comes
            self._idle.put_nowait(self._start())


class _Child(asyncio.Protocol):
    """One process and the socket to it."""

    def __init__(self, setup: Any) -> None:
        self.whole: dict[str, bool] = {}  # of each scorer that loaded: takes a group at once
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._socket.sendall(frame(setup))
        self._socket.setblocking(False)
        self._transport: asyncio.Transport | None = None
        self._buffer, self._frames, self._lost = bytearray(), list[Any](), False
        self._news = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def ask(self, request: bytes, name: str, count: int, budget: float) -> tuple[list[Outcome], str | None]:
        """The outcomes of the first samples, and why there are fewer than ``count``, or None."""
        if self._transport is None:
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)
            if fault := await self._receive(1, START_S):
                return [], f"its process did not start: {fault}"
            self.whole = self._frames.pop()
        self._transport.write(request)
        seconds = budget * (count if self.whole.get(name) else 1)
        fault = await self._receive(count, seconds + GRACE_S)
        found, self._frames = self._frames[:count], []
        if fault == "":
            fault = f"ran over its budget of {seconds:g} s where no signal reaches it; its process was ended"
        return found, fault

    async def _receive(self, count: int, seconds: float) -> str | None:
        """Wait until there are ``count`` frames, no longer than ``seconds`` for each. Why there are not, "" if late."""
        while len(self._frames) < count:
            self._news.clear()
            if self._lost:
                return f"its process {_ended(await asyncio.to_thread(self._process.wait))}"
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                return ""
        return None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            self._frames.append(pickle.loads(self._buffer[HEAD.size : end]))
            del self._buffer[:end]
            self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._news.set()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._transport:
            self._transport.abort()
        else:
            self._socket.close()


def _ended(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    hint = "; it may have run out of memory" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"
