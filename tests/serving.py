"""A real SGLang server and the engine that runs it, in an event loop of its own, for tests that are not coroutines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miles_core.edges.protocols import Completion, Request
from miles_core.edges.sglang.client import KeepingClient, SGLangClient
from miles_core.edges.sglang.launch import Live
from miles_core.edges.sglang.server import SGLangEngine

START_S = 400.0  # for a server to come up, kernels that it compiles included


def until[T](condition: Callable[[], T], patience_s: float, what: str) -> T:
    """The first true answer. Raises AssertionError with ``what`` when there is none in time."""
    deadline = time.monotonic() + patience_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s:g} s"
        time.sleep(0.05)
    return answer


class Turning:
    """An event loop that turns in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, daemon=True)
        self._thread.start()

    def _turn(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:  # which ends what is left, as asyncio.run does
            runner.get_loop().run_forever()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(START_S)


@dataclass
class InProcess:
    """A worker whose engine lives in this process."""

    name: str
    engine: SGLangEngine
    turning: Turning

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await asyncio.wrap_future(self.turning.submit(getattr(self.engine, method)(*args)))  # from any loop

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return self.turning.submit(getattr(self.engine, method)(*args)).result(timeout or START_S)

    async def kill(self) -> None:
        raise NotImplementedError


@dataclass
class Served:
    """One engine, a client of it, and the version of its weights."""

    worker: InProcess
    client: SGLangClient
    version: int = 0

    def ask(self, method: str, *args: Any) -> Any:
        return self.worker.ask(method, *args)

    def start(self, requests: list[Request]) -> Future[list[Completion]]:
        return self.worker.turning.submit(self.client.generate(requests))

    def generate(self, requests: list[Request]) -> list[Completion]:
        return self.start(requests).result(START_S)

    def live(self) -> Live:
        """The server, once it is up."""
        found: Live = self.worker.turning.submit(self.worker.engine._live()).result(START_S)
        return found


@contextmanager
def serving(args: tuple[Any, ...], **options: Any) -> Iterator[Served]:
    """``args`` and ``options`` of the engine; what it starts is gone when this ends."""
    turning = Turning()

    async def make() -> Served:
        worker = InProcess("engine-0", SGLangEngine(*args, **options), turning)
        return Served(worker, SGLangClient([worker], START_S))

    served: Served = turning.submit(make()).result()
    try:
        served.ask("ready")
        yield served
    finally:
        served.ask("close")
        turning.end()


@contextmanager
def keeping(served: Served) -> Iterator[Served]:
    """The same server; its engine and the client such as ``rollout.weights = "in_place"`` makes them."""

    async def client() -> KeepingClient:
        return KeepingClient([served.worker], START_S)

    served.worker.engine._keeps = True
    try:
        yield Served(served.worker, served.worker.turning.submit(client()).result(), served.version)
    finally:
        served.worker.engine._keeps = False
