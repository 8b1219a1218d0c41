"""A handle on one process, good in every process of the run."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from ..protocols import WorkerDied
from . import leash
from .failure import Failure
from .host import Place

GONE_S = 5.0  # for a killed process to disappear
LOOKS = 10  # for an answer, before a process is held to hang: one is lost where this process itself stood still
TAIL_BYTES, TAIL_LINES = 8192, 8


@dataclass(slots=True)
class RayWorker:
    """Implements ``types.Worker``.

    Arguments are pickled, except that one which is a reference from ``Cluster.share`` arrives as its value; inside a
    list or dict it stays a reference. NumPy arrays of 100 kB and more arrive as read-only views of shared memory.
    """

    name: str
    actor: Any
    place: Place
    born: str | None  # of its process, where that runs on the machine of the driver
    _caller: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _calls: Iterator[int] = field(default_factory=count, init=False)
    _sending: threading.Lock = field(default_factory=threading.Lock, init=False)
    _hung: str = field(default="", init=False)  # why it was killed, if it was for that

    def __reduce__(self) -> tuple[type[RayWorker], tuple[Any, ...]]:
        return RayWorker, (self.name, self.actor, self.place, self.born)  # a copy is another caller

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        future = self._send(method, *args)
        try:
            async with asyncio.timeout(timeout):
                result = await asyncio.wrap_future(future)
        except TimeoutError:
            await self.kill()
            self._silent(method, timeout)
        except RayError as error:
            if isinstance(error, ActorUnavailableError):
                await self.kill()
            self._broken(method, error)
        return _opened(result)

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        future = self._send(method, *args)
        try:
            result = future.result(timeout)
        except TimeoutError:
            self._end()
            self._silent(method, timeout)
        except RayError as error:
            if isinstance(error, ActorUnavailableError):
                self._end()
            self._broken(method, error)
        return _opened(result)

    async def build(self, target: str, args: tuple[Any, ...]) -> None:
        """Construct the object that ``call`` talks to. Raises what its module or constructor raised."""
        try:
            result = await self.actor.build.remote(target, *args)
        except RayError as error:
            self._broken("its constructor", error)
        _opened(result)

    async def watch(self, silence: float) -> None:
        """Kill the process where it answers nothing for ``silence`` seconds; returns once it is gone.

        One that is stopped, or hangs in a device or a file system, looks alive to Ray, and its calls would never end.
        """
        while ray.is_initialized():
            answer = asyncio.wrap_future(self.actor.here.remote().future())
            for _ in range(LOOKS):
                if answer.done():
                    break
                await asyncio.wait([answer], timeout=silence / LOOKS)
            else:
                self._hung = f"answered nothing for {silence:g} s (ray.silence_s), and was killed"
                await self.kill()
            try:
                await answer
            except RayError:
                return  # whoever has a call under way, or makes another, is told
            await asyncio.sleep(silence / LOOKS)

    async def kill(self) -> None:
        """End the process now; returns once it is gone where it runs on this machine. Calls under way fail."""
        self._end()
        deadline = monotonic() + GONE_S
        while self._here() and leash.born(self.place.pid) == self.born and monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _send(self, method: str, *args: Any) -> Future[Any]:
        if not ray.is_initialized():  # else Ray would start a new cluster for the call
            raise WorkerDied(f"{self.name} is gone: its cluster was closed")
        with self._sending:
            number = next(self._calls)
            try:
                future: Future[Any] = self.actor.call.remote(self._caller, number, method, *args).future()
            except BaseException:  # what cannot be pickled is not sent
                self._skip(number)
                raise
        future.add_done_callback(lambda done: self._skip(number) if _undelivered(done) else None)
        return future

    def _skip(self, number: int) -> None:
        """Let the calls after ``number`` go on: it will never arrive."""
        self.actor.turn.remote(self._caller, number)

    def _end(self) -> None:
        if ray.is_initialized():
            ray.kill(self.actor, no_restart=True)
            if self.born and self._here():  # Ray gives a stopped process five seconds before it uses force
                leash.end(self.place.pid, self.born)

    def _here(self) -> bool:
        return bool(self.born and ray.is_initialized() and self.place.node == ray.get_runtime_context().get_node_id())

    def _silent(self, method: str, timeout: float | None) -> NoReturn:
        raise WorkerDied(
            f"{self.name} did not answer {method} within {timeout:g} s, and was killed{self._last_words()}"
        ) from None

    def _broken(self, method: str, error: RayError) -> NoReturn:
        """Raise what Ray's own exception means; its text, long and about Ray, goes into a note."""
        if isinstance(error, RayTaskError):
            what: Exception = RuntimeError(f"{self.name}: {method}: arguments or result cannot be sent: {error.cause}")
        elif isinstance(error, RayActorError):
            how = "cannot be reached" if isinstance(error, ActorUnavailableError) else "died"
            if "ray.kill" in str(error):
                how = "was killed"
            what = WorkerDied(f"{self.name} {self._hung or how} during {method}{self._last_words()}")
        else:
            what = WorkerDied(f"{self.name} did not finish {method}: {type(error).__name__}{self._last_words()}")
        what.add_note(f"what Ray says of it:\n{error}")
        raise what from None

    def _last_words(self) -> str:
        """The end of what the process printed, where its log can be read from here."""
        if not self.place.log:
            return ""
        try:
            with Path(self.place.log).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines()]
        except OSError:
            return f"; its log is {self.place.log} on its own machine"
        tail = [line for line in lines if line][-TAIL_LINES:]
        return "".join(f"\n  {line}" for line in [f"last lines of {self.place.log}:", *tail]) if tail else ""


def _undelivered(future: Future[Any]) -> bool:
    """Whether a call failed before, or after, the method itself; a process that is gone needs no more calls."""
    error = None if future.cancelled() else future.exception()
    return isinstance(error, RayError) and not isinstance(error, RayActorError)


def _opened(result: Any) -> Any:
    if isinstance(result, Failure):
        raise result.error() from None
    return result
