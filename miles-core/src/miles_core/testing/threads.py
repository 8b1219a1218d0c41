"""A cluster whose processes are threads of this one: the same loop, trainer and engine, no Ray.

What is called and what is answered is pickled on its way, as between processes. Only one run at a time: a process has
one set of ``torch.distributed`` groups.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from concurrent.futures import Future
from importlib import import_module
from typing import Any

from ..edges.protocols import Process, Worker, WorkerDied

WORKERS: dict[str, ThreadWorker] = {}


class ThreadWorker:
    """See ``types.Worker``: an object in a thread with an event loop of its own."""

    def __init__(self, process: Process) -> None:
        self.name = process.name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=process.name, daemon=True)
        self._thread.start()
        WORKERS[self.name] = self

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _worker, (self.name,)

    async def build(self, process: Process) -> None:
        module, _, name = process.target.partition(":")
        target, args = getattr(import_module(module), name), _sent(process.args)

        async def make() -> None:
            self._object = target(*args)

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(make(), self._loop))

    def _send(self, method: str, args: tuple[Any, ...]) -> Future[bytes]:
        given = pickle.dumps(args, pickle.HIGHEST_PROTOCOL)

        async def invoke() -> bytes:
            result = getattr(self._object, method)(*pickle.loads(given))
            if isinstance(result, Future):
                result = asyncio.wrap_future(result)
            return pickle.dumps(await result if inspect.isawaitable(result) else result, pickle.HIGHEST_PROTOCOL)

        if not self._thread.is_alive():
            raise WorkerDied(f"{self.name} was killed")
        return asyncio.run_coroutine_threadsafe(invoke(), self._loop)

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        answer = asyncio.wrap_future(self._send(method, args))
        return pickle.loads(await asyncio.wait_for(answer, timeout))

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return pickle.loads(self._send(method, args).result(timeout))

    async def kill(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


class Threads:
    """See ``types.Cluster``."""

    def __init__(self) -> None:
        self._workers: list[ThreadWorker] = []

    async def start(self, process: Process) -> Worker:
        worker = ThreadWorker(process)
        self._workers.append(worker)
        await worker.build(process)
        return worker

    async def share(self, value: Any) -> Any:
        return pickle.loads(pickle.dumps(value, 5))

    async def fetch(self, references: list[Any]) -> list[Any]:
        return references

    async def close(self) -> None:
        for worker in self._workers:
            await worker.kill()
        import torch.distributed as dist

        if dist.is_initialized():
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _sent(args: tuple[Any, ...]) -> Any:
    return pickle.loads(pickle.dumps(args))


def _worker(name: str) -> ThreadWorker:
    return WORKERS[name]
