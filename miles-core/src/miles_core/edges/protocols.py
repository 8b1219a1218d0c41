"""What the loop asks of the systems outside it, and what they exchange: the protocols that edges answer to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Batch, Layout, Output, Refused
from .room import naming, sync

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor, nn

# -- sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1.0 keep the whole vocabulary."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. Requests with equal ``tokens`` share their prefill."""

    id: str
    tokens: list[int]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled: token ids and, of each, its log-probability and the version of the weights that wrote it.

    ``logprobs`` are under the distribution actually sampled from (after temperature, top-k and top-p). A greedy
    completion has none to speak of: they are those of temperature 1.
    """

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str


class Engine(Protocol):
    """What a rollout talks to: every engine of the run behind one object."""

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of the requests. Raises EngineError when no engine can answer."""
        ...


class EngineError(Exception):
    """An engine failed a request in a way that a retry did not mend."""


class NoEngine:
    """What a rollout talks to where ``placement.engines`` is 0."""

    def __init__(self, engines: list[Worker], timeout_s: float) -> None:
        pass

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Raises Refused."""
        raise Refused("nothing can be sampled: placement.engines = 0; say 1 or more, or give data.responses")


# -- training --------------------------------------------------------------------------------------------------------

Forward = Callable[["nn.Module", Batch], Output]


class Model(Protocol):
    """One role's model as this training rank holds it. Every method is a collective: all ranks call it together."""

    layout: Layout

    def run(
        self, batches: list[Batch], forward: Forward, loss: Callable[[Batch, Output], Tensor] | None
    ) -> list[Output]:
        """Forward every micro-batch, and backward where ``loss`` is given; gradients add up until ``step``.

        ``loss`` returns a scalar already divided by its global denominator: gradients are summed over micro-batches
        and data-parallel ranks, never averaged. Outputs come back detached on the last stage, empty elsewhere.
        """
        ...

    def step(self, veto: Callable[[float], str | None]) -> tuple[dict[str, float], str | None]:
        """Clip, ask ``veto`` with the gradient norm, then step the optimizer and the schedule, and clear gradients.

        Returns metrics (``grad_norm``, ``lr``) and the reason the step was skipped, or None.
        """
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the data-parallel ranks."""
        ...

    def memory(self) -> str:
        """What it takes of this rank's GPU, in words; nothing where there is none."""
        ...

    def save(self, folder: Path) -> Callable[[], None]:
        """Copy all that a later ``load`` needs; returns what writes the copy into ``folder``, while training goes on.

        What is returned may run in another thread and raises OSError, on all ranks if on one. It is a collective that
        does not mix with others, and ends before the next ``save`` of this model, whose copies take the same memory.
        Where a disk was full, as the OSError's number says, it is run again, and writes what is not whole.
        """
        ...

    def load(self, folder: Path) -> None: ...

    def save_hf(self, folder: Path) -> None:
        """Write the weights in Hugging Face format, with the configuration and tokenizer they came with.

        Raises OSError on all ranks if on one; of a full disk, it can be asked again.
        """
        ...


# -- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A long-lived process to start: ``target`` is ``module:Class``, imported where it runs."""

    name: str
    target: str
    args: tuple[Any, ...] = ()
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1  # for torch and OpenMP
    beside: tuple[str, ...] = ()  # processes started before it, whose GPUs it shares, on their machine
    here: bool = False  # on the machine of the driver, whose disk it needs


class Worker(Protocol):
    """A handle on a process started elsewhere; it can be sent to other processes."""

    name: str

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Run one method there. Raises what it raised; WorkerDied when the process is gone or did not answer."""
        ...

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """``call`` for code that is not async; blocks."""
        ...

    async def kill(self) -> None: ...


class WorkerDied(Exception):
    """A process died, or was killed after it stopped answering."""


async def everyone(workers: list[Worker], method: str, *args: Any) -> list[Any]:
    """One call to each worker at once; answers in their order.

    Where several fail, a death explains the rest: peers of a dead rank only see a closed connection.
    """
    import asyncio  # here, since `miles plugins` is quicker without

    if not workers:
        return []
    calls = [asyncio.ensure_future(worker.call(method, *args)) for worker in workers]
    try:
        _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            await asyncio.wait(waiting, timeout=3)
        errors = [error for call in calls if call.done() and (error := call.exception())]
    finally:
        for call in calls:
            call.cancel()
            call.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks a late one
    for error in sorted(errors, key=lambda error: not isinstance(error, WorkerDied)):
        raise error
    return [call.result() for call in calls]


async def both[A, B](first: asyncio.Task[A], second: asyncio.Task[B]) -> tuple[A, B]:
    """Wait for two tasks. Where both fail ``first`` is the cause: a step waits for rollouts, weights for training."""
    import asyncio

    try:
        await asyncio.wait([first, second], return_when=asyncio.FIRST_EXCEPTION)
        for error in [task.exception() for task in (first, second) if task.done()]:
            if error:
                raise error
        return first.result(), second.result()
    finally:
        first.cancel()
        second.cancel()


def meeting() -> str:
    """An address on this machine where processes can meet."""
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        host = socket.gethostbyname(socket.gethostname())
        return f"tcp://{host}:{free.getsockname()[1]}"


class Behind:
    """A thread of low priority for what is written while training goes on: one list of tasks at a time."""

    def __init__(self) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind", initializer=_yield)
        self._left: list[Callable[[], object]] = []  # of the last list, the one under way included
        self.done: Future[None] = Future()  # the last list, or what its first failure raised
        self.done.set_result(None)

    def start(self, tasks: list[Callable[[], object]]) -> None:
        """Do ``tasks`` in their order; returns at once."""
        self._left = list(tasks)
        self.done = self._thread.submit(self._work)

    def go_on(self) -> Future[None]:
        """``done``; where it has failed the task that failed is done once more, and then the rest."""
        if self.done.done() and self.done.exception():
            self.done = self._thread.submit(self._work)
        return self.done

    def _work(self) -> None:
        while self._left:
            self._left[0]()
            del self._left[0]


def writing(path: Path, text: str) -> Callable[[], None]:
    """A task that writes ``text``, to the disk itself. It raises OSError, which names the path whatever failed."""

    def write() -> None:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            sync(path)

    return write


def _yield() -> None:
    """Give this thread what others leave of the cores."""
    import os
    import threading

    with suppress(OSError, AttributeError):  # threads have priorities of their own on Linux only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Cluster(Protocol):
    """Where processes run."""

    async def start(self, process: Process) -> Worker:
        """A new named process, once its constructor returned. Raises what the constructor raised."""
        ...

    async def share(self, value: Any) -> Any:
        """A reference to ``value`` that ``Worker.call`` resolves on the other side; sent once however often used.

        It is a copy: ``value`` may be changed afterwards. What it takes is given back with its last reference.
        """
        ...

    async def fetch(self, references: list[Any]) -> list[Any]:
        """What ``share`` was given, for the one who shared it. Raises WorkerDied where it is lost."""
        ...

    async def close(self) -> None:
        """End every process started here, and the local cluster if this run started one."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """How to start the engines and how to reach them: ``client`` is ``module:Class``, built from their workers.

    Each answers ``ready()`` when it can serve, with what it has, in words, and the calls that ``Transport`` names.
    """

    processes: list[Process]
    client: str


class Transport(Protocol):
    """Moves one version of the weights out of a training rank, a bucket at a time. One object per rank; blocking.

    The driver brackets it: every engine is asked ``begin_update(version)``, every rank sends, then every engine is
    asked ``end_update()``, so that no engine serves mixed weights. A failure on the way ends in ``abort_update()``.
    The answer to ``begin_update`` says which of its servers takes them, in a word that none after it has; that to
    ``end_update`` is the share of the time since the last one in which it had requests running.
    In layout "colocate" engines are asked ``sleep()`` before a training: to give it their memory, until weights arrive.
    """

    def connect(self, engines: list[Worker], layout: Layout) -> None: ...

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool, servers: list[str]) -> dict[str, float]:
        """Send all that ``tensors`` yields; with ``verify`` see by checksums whether every tensor arrived. ``servers``
        are what the engines answered to ``begin_update``: by another word, something that knew the one before is gone.

        Returns metrics (``bytes``, ``tensors``). Raises TransportError naming the tensor and the engine.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor inside a ``Bucket``: ``length`` bytes from ``offset``."""

    name: str
    dtype: str  # torch's name without the prefix, such as "float32"
    shape: tuple[int, ...]
    offset: int
    length: int
    checksum: int | None  # crc32 of the bytes; None when not verifying


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors laid end to end in a shared-memory segment; an engine's ``load(bucket)`` copies them in place."""

    segment: str  # the path it can be opened and mapped by, on the same machine
    pieces: tuple[Piece, ...]


class TransportError(Exception):
    """Weights did not arrive as sent."""
