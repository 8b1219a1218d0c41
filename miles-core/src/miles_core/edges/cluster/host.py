"""What runs in every process: one Ray actor that builds an object of any class and calls its methods."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .failure import Failure


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process came up."""

    pid: int
    node: str  # Ray's id of the machine
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES has them
    log: str | None  # the file its output goes to, where that can be told


@dataclass(slots=True)
class _Line:
    """The calls of one caller: which comes next, and those that arrived too early."""

    next: int = 0
    early: dict[int, asyncio.Future[None]] = field(default_factory=dict)


class Host:
    """An object of the target class, its constructor and all methods run in one thread, or in one event loop.

    A class with an ``async def`` method lives in the event loop: many calls are under way at once, and a plain method
    blocks them all. Any other class lives in a single thread, because modes and thread counts of torch belong to the
    thread that set them; where a method returns a future, that is waited for beside the thread. Calls through one
    handle begin in the order they were made.
    """

    def __init__(self, name: str, threads: int, log: str | None, gpus: tuple[str, ...] | None) -> None:
        """``gpus`` are another process's, to be shared; None leaves those that Ray gave to this one."""
        self.name, self.threads = name, threads
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported, which is yet to come
            os.environ[variable] = str(threads)
        if log:
            _redirect(log)
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lines: dict[str, _Line] = {}

    async def place(self) -> Place:
        import ray

        log = None
        with suppress(OSError):
            log = os.readlink("/proc/self/fd/2")
        gpus = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        return Place(os.getpid(), ray.get_runtime_context().get_node_id(), gpus, log)

    async def here(self) -> None:
        """Answers as long as this process runs, whatever its thread is at."""

    async def build(self, target: str, *args: Any) -> Failure | None:
        """Import ``module:Class`` and construct it; None when all went well."""
        cls = await self._in_thread(self._import, target)
        if isinstance(cls, Failure):
            return cls
        if any(inspect.iscoroutinefunction(f) for _, f in inspect.getmembers(cls, inspect.isfunction)):
            self._thread = None
            made = self._run(cls, *args)
        else:
            made = await self._in_thread(cls, *args)
        if isinstance(made, Failure):
            return made
        self._object = made
        gc.freeze()  # what was imported stays: collections need not walk it again
        return None

    async def call(self, caller: str, number: int, method: str, *args: Any) -> Any:
        """What the method returns, or a Failure. ``number`` counts the calls of one ``caller``, from 0."""
        await self.turn(caller, number)
        try:
            function = getattr(self._object, method)
            if self._thread:
                result = await self._in_thread(function, *args)
                return await asyncio.wrap_future(result) if isinstance(result, Future) else result
            result = function(*args)
            return await result if inspect.isawaitable(result) else result
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return Failure.of(error, self.name, _inner(error))

    async def turn(self, caller: str, number: int) -> None:
        """Returns once every call of ``caller`` before ``number`` has begun.

        Ray starts the calls of an async actor in any order, and two collectives that two ranks begin in different
        orders never end.
        """
        line = self._lines.setdefault(caller, _Line())
        if number < line.next:
            return  # it was begun, and only its result was lost
        if number > line.next:
            line.early[number] = asyncio.get_running_loop().create_future()
            await line.early[number]
        line.next += 1
        if follower := line.early.pop(line.next, None):
            follower.set_result(None)

    def _import(self, target: str) -> type:
        module, _, name = target.partition(":")
        cls: type = getattr(import_module(module), name)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self.threads)
        return cls

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, function, *args)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:  # of any kind: SystemExit too would leave the asker waiting
            return Failure.of(error, self.name, _inner(error))


def _inner(error: BaseException) -> Any:
    """The traceback from below this file."""
    return error.__traceback__.tb_next if error.__traceback__ else None


def _redirect(log: str) -> None:
    """Send what this process prints, C libraries included, to the end of a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
