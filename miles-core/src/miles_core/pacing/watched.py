"""What every process was doing when, as far as the calls of the driver tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from ..edges.protocols import Cluster, Process, Worker

# What a process does while it answers a call, and what it does from then on until the next of these calls. One that
# answers False did nothing: an engine that keeps its memory.
DOING = {
    "train": ("train", "wait"),
    "columns": ("train", "wait"),
    "evaluate": ("evaluate", "wait"),
    "push": ("sync", "wait"),
    "save": ("save", "wait"),
    "sleep": ("sync", "sleep"),  # an engine that gives its memory to the training
    "begin_update": ("sync", "sync"),
    "end_update": ("sync", "serve"),
    "abort_update": ("sync", "wait"),
    "write": ("write", "wait"),
}
LEAST_S = 1e-3  # what is shorter is nothing but the way from one call to the next


class Told(Protocol):
    def __call__(self, *, process: str, doing: str, began: float, ended: float) -> object: ...


@dataclass(slots=True)
class WatchedWorker:
    """See ``protocols.Worker``; a copy sent to another process is one that nobody watches."""

    worker: Worker
    told: Told
    name: str
    last: str = ""  # the call that was answered last
    ended: float = 0.0  # and when

    def __reduce__(self) -> tuple[Any, tuple[Worker]]:
        return _same, (self.worker,)

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method not in DOING:
            return await self.worker.call(method, *args, timeout=timeout)
        asked = time.time()
        answer = await self.worker.call(method, *args, timeout=timeout)
        if answer is not False and (self.last, method) != ("sleep", "begin_update"):  # ``sleep`` began the update
            self._answered(method, asked)
        return answer

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return self.worker.ask(method, *args, timeout=timeout)

    async def kill(self) -> None:
        await self.worker.kill()

    def _answered(self, method: str, asked: float) -> None:
        """A process does one thing after another: what it was asked while it did something else began after that."""
        now, before = time.time(), self.last
        began = min(max(asked, self.ended), now)
        if before and began - self.ended >= LEAST_S:
            self.told(process=self.name, doing=DOING[before][1], began=self.ended, ended=began)
        self.told(process=self.name, doing=DOING[method][0], began=began, ended=now)
        self.last, self.ended = method, now


@dataclass(slots=True)
class WatchedCluster:
    """See ``protocols.Cluster``: one whose processes are watched."""

    cluster: Cluster
    told: Told

    async def start(self, process: Process) -> Worker:
        return WatchedWorker(await self.cluster.start(process), self.told, process.name)

    async def share(self, value: Any) -> Any:
        return await self.cluster.share(value)

    async def fetch(self, references: list[Any]) -> list[Any]:
        return await self.cluster.fetch(references)

    async def close(self) -> None:
        await self.cluster.close()


def _same(worker: Worker) -> Worker:
    return worker
