"""What outlives a process of the run: its state, its checkpoints, its account of prompts, and groups that wait."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Group
from .room import FULL, PAUSE, goes_on, waits

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path


@dataclass(slots=True)
class RunState:
    """All that the driver needs to go on from where it stopped; the ranks keep theirs beside it."""

    step: int = 0
    position: int = 0  # in the ledger
    ripe: list[int] = field(default_factory=list)  # groups in the queue, or taken from it for the next step
    dropped: list[Group] = field(default_factory=list)  # sampled with them, and not told of in any step's metrics yet
    plugins: dict[str, Any] = field(default_factory=dict)  # what miles_state answered
    seconds: float = 0.0  # of this run, over every process that worked on it


class Told(Protocol):
    def __call__(self, *, text: str) -> object: ...


async def insist[**P, T](say: Told, do: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``do`` answers. While it raises OSError of a full disk, which ``say`` hears of, it is done again.

    From one attempt to the next it takes as long as the attempt took, a second at least: the event loop turns
    meanwhile, and whatever else is written gets its share of the disk.
    """
    import asyncio  # here, since `miles status` is quicker without

    began, where = 0.0, ""
    while True:
        tried = time.monotonic()
        try:
            answer = await do(*args, **kwargs)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not where:
                say(text=waits(error))
                began, where = tried, str(error.filename)
            await asyncio.sleep(max(PAUSE, time.monotonic() - tried))
        else:
            if where:
                say(text=goes_on(where, began))
            return answer


class Store(Protocol):
    """Keeps checkpoints. Raises OSError where it cannot write; of a full disk, what was asked can be asked again."""

    def claim(self, resume: bool) -> Path | None:
        """Make the run folder this run's. A run found there is moved aside, never overwritten; returns where to."""
        ...

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into. It counts only after ``commit``."""
        ...

    def commit(self, folder: Path, state: RunState) -> Path:
        """Make it whole and durable, then forget the oldest ones; returns its final place."""
        ...

    def ledger(self, say: Callable[[str], None]) -> Ledger:
        """This run's, as its last process left it."""
        ...

    def newest(self, say: Callable[[str], None]) -> tuple[Path, RunState] | None:
        """The newest whole checkpoint, or None; ``say`` hears of each one that is not whole."""
        ...


class Ledger(Protocol):
    """The account of every prompt of a run. Ids are 1, 2, 3, ... in the order of the data.

    Each id that was taken is in exactly one state: ``waiting`` to be sampled, with a ``worker``, in the ``queue`` for
    the trainer, with the ``trainer`` for a step, ``trained``, or ``dropped``. A call is one record in a log, there
    before the call returns, and names any number of ids; without ids it does nothing. It raises LedgerError, and
    changes nothing, where an id is not in the state that it claims. A full disk makes it wait; any other OSError is
    raised. Blocking, and for the driver alone.
    """

    position: int  # records so far; a checkpoint remembers it

    @property
    def cursor(self) -> int:
        """The largest id that was taken."""
        ...

    def next(self) -> int:
        """The prompt to sample next: the smallest id that waits, else the one after ``cursor``. Leases nothing."""
        ...

    def lease(self, ids: Iterable[int], to: str) -> None:
        """A worker samples them: waiting -> worker. New ids, in a row after ``cursor``, are taken on the way."""
        ...

    def queue(self, ids: Iterable[int]) -> None:
        """Sampled and scored: worker -> queue."""
        ...

    def back(self, ids: Iterable[int], why: str) -> None:
        """To be sampled again, since a lease died or they are too old: worker, queue or trainer -> waiting."""
        ...

    def drop(self, ids: Iterable[int], why: str) -> None:
        """Not worth training on: worker or queue -> dropped."""
        ...

    def give(self, ids: Iterable[int], step: int) -> None:
        """Into a step's batch: queue -> trainer."""
        ...

    def trained(self, step: int) -> None:
        """The step is done: what the trainer holds for it -> trained. Holding nothing for it is a LedgerError."""
        ...

    def sync(self) -> None:
        """To the disk itself, before a checkpoint that remembers ``position`` counts. Nothing else waits for disks."""
        ...

    def rewind(self, position: int, step: int, kept: Iterable[int]) -> None:
        """Go on from the checkpoint that was written at ``position``, after ``step``; position 0 is the start.

        What was trained and dropped is so again. Of the rest, ids in ``kept``, whose samples survived, are in the
        queue, also those taken after ``position``; every other id up to the largest of them all waits. One record;
        those after ``position`` stay in the log and are void. Raises Refused where the log does not have ``position``.
        """
        ...

    def counts(self) -> dict[str, int]:
        """How many ids are in each of the six states."""
        ...

    def where(self, id: int) -> tuple[str, str | int | None]:
        """The state of an id, or ``not taken``; its worker, its step (0 where a damaged log lost it), its reason."""
        ...

    def reasons(self) -> Counter[str]:
        """How many ids were dropped for each reason."""
        ...

    def close(self) -> None: ...


class LedgerError(Exception):
    """A prompt is not where a record claims it to be."""


class Queue(Protocol):
    """Where groups wait between sampling and training, and outlive the processes of the run. For one event loop."""

    async def open(self) -> dict[int, int]:
        """Begin; returns ids and sizes in bytes of what an earlier process of this run left, in its order."""
        ...

    async def put(self, id: int, value: Any, needs: Callable[[], int | None] = lambda: 0) -> float:
        """Take a copy of ``value`` once there is room for it, in the order of the calls; returns seconds without room.

        Meanwhile ``needs`` is asked time and again: it is 0 while some of what waits will be taken as things are, None
        where ``value`` is not to wait but to go beyond the room, and else how many must be here before any is taken.

        Raises Refused in that last case, or where ``value`` is larger than all the room there is, and ValueError of an
        id that is in the queue.
        """
        ...

    async def get(self, ids: list[int]) -> list[Any]:
        """Values in that order: they wait no more and take no room, but stay until they are forgotten.

        Raises LookupError of an id that is not here, or not whole.
        """
        ...

    def each(self) -> AsyncIterator[Any]:
        """Every value, in any order and a few at a time; they go on waiting. Raises LookupError as ``get`` does."""
        ...

    async def forget(self, ids: list[int]) -> None:
        """Give them up, also on disk; ids that are not here are passed over."""
        ...

    async def sync(self) -> None:
        """Make durable what was put so far: it outlives a power cut. Raises OSError where the disk fails."""
        ...

    @property
    def used(self) -> tuple[int, int]:
        """Bytes that wait, and how many may."""
        ...

    async def close(self) -> None:
        """End the process; what is on disk stays there."""
        ...
