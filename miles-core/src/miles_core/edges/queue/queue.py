"""The queue as the driver holds it: what is where, who waits for room, and what to do when the journal dies."""

from __future__ import annotations

import asyncio
import io
import pickle
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...types import Refused
from ..identity import run_id
from ..protocols import Cluster, Process, Worker, WorkerDied
from .entry import BATCH, MANY, Batch, Entry, parts

TARGET = "miles_core.edges.queue.journal:Journal"
SEGMENT = 64 << 20  # bytes
SMALL = 64 << 10  # bytes: less travels in the call itself, as the object store takes a millisecond for any size
TURN = 1 << 20  # bytes put before the event loop gets a turn, so that they are written while others are put
RETRY_S = 1.0  # between two looks at a disk that was full, or at what the trainer needs
DEATHS = 3  # of the process in a row, with nothing done in between
CLOSE_S = 5.0  # for the last writes
ROOM = "the queue's disk has room again: the run goes on"


class JournaledQueue:
    """Implements ``protocols.Queue``: payloads in the object store up to ``memory`` bytes, all of them in the journal.

    A payload is written to the journal once, soon after it was put. Beyond ``memory`` the driver lets go of written
    ones, those that were got already first, then the newest, which are needed last, and reads them back from there.
    A put waits while ``capacity`` bytes wait to be got, or while ``memory`` is full of what is not written yet. What
    was got stays on disk beyond ``capacity``: a checkpoint lets go of it, and comes only if the trainer gets more.

    The process of the journal runs on the driver's machine, and on no other: where Ray has several, ``run_dir`` needs
    to be on the driver's disk only. A run that is to go on elsewhere needs a ``run_dir`` that both machines see.
    """

    def __init__(self, cluster: Cluster, run_dir: Path, memory: int, capacity: int, say: Callable[[str], None]) -> None:
        self._cluster, self._folder, self._say = cluster, run_dir.absolute() / "queue", say
        self._memory, self._capacity = memory, capacity
        self._entries: dict[int, Entry] = {}
        self._used = self._held = self._unturned = self._deaths = 0  # all but the last in bytes
        self._told_full = False
        self._pending: deque[Entry] = deque()  # to be written, in the order of ``put``
        self._flying = Batch()  # what the journal is being asked to write
        self._gone: list[int] = []  # forgotten, and the journal does not know yet
        self._resident: dict[int, Entry] = {}  # written and held, the newest last
        self._got: dict[int, Entry] = {}  # those of them that were asked for
        self._worker: Worker | None = None
        self._pump: asyncio.Task[None] | None = None
        self._failed: BaseException | None = None
        self._line, self._reviving = asyncio.Lock(), asyncio.Lock()
        self._work, self._changed = asyncio.Event(), asyncio.Event()
        self._scratch = io.BytesIO()  # memory that is warm: a fresh megabyte costs more than what is written into it

    # -- what protocols.Queue promises ---------------------------------------------------------------------------
    async def open(self) -> dict[int, int]:
        self._worker = await self._start()
        found = await self._hello(self._worker)
        for id, size in found.items():
            self._entries[id] = Entry(id, size, written=True)
            self._used += size
        self._pump = asyncio.create_task(self._write())
        return found

    async def put(self, id: int, value: Any, needs: Callable[[], int | None] = lambda: 0) -> float:
        if self._unturned >= TURN:  # before anything is taken in: whoever put it knows of it as soon as others may
            self._unturned = 0
            await asyncio.sleep(0)
        async with self._line:
            self._scratch.seek(0)
            pickle.Pickler(self._scratch, 5).dump(value)
            size = self._scratch.tell()
            if size > self._capacity:
                gives = f"queue.capacity_mib = {self._capacity >> 20} gives room for {self._capacity:,}"
                raise Refused(
                    f"group {id} takes {size:,} bytes, and {gives}; raise it, or sample fewer or shorter responses"
                )
            if id in self._entries:
                raise ValueError(f"group {id} is in the queue already")
            waited = await self._room(id, size, needs)
            while not self._fits(size):
                await self._change()
            self._check()
            self._take_in(Entry(id, size, await self._payload(size)))
        self._work.set()
        self._unturned += max(size, TURN >> 6)
        return waited

    async def get(self, ids: list[int]) -> list[Any]:
        self._check()
        values: dict[int, Any] = {}
        turned, wanted = 0, [self._entry(id) for id in ids]
        for entry in wanted:
            self._waits_no_more(entry)
        async for entry, payload in self._payloads(wanted):
            values[entry.id] = pickle.loads(payload)
            if self._resident.pop(entry.id, None):
                self._got[entry.id] = entry
            if (turned := turned + entry.size) >= TURN:
                turned = 0
                await asyncio.sleep(0)
        return [values[id] for id in ids]

    async def each(self) -> AsyncIterator[Any]:
        self._check()
        for part in parts([self._entry(id) for id in self._entries]):
            async for _, payload in self._payloads(part):
                yield pickle.loads(payload)

    async def forget(self, ids: Iterable[int]) -> None:
        for id in ids:
            if (entry := self._entries.pop(id, None)) is None:
                continue
            entry.gone = True
            self._waits_no_more(entry)
            if entry.written or entry in self._flying.entries:
                self._gone.append(id)
            self._release(entry)
        self._work.set()

    async def sync(self) -> None:
        full = False
        while True:
            waiting = [*self._flying.entries, *self._pending]
            while any(not (entry.written or entry.gone) for entry in waiting):
                await self._change()
            self._check()
            lost, why = await self._ask("sync")
            self._lack([entry for id in lost if (entry := self._entries.get(id))])
            if bool(why) != full:
                full = not full
                self._say(_paused(why, self._folder) if why else ROOM)
            if why:
                await asyncio.sleep(RETRY_S)
            elif not lost:
                return

    @property
    def used(self) -> tuple[int, int]:
        return self._used, self._capacity

    async def close(self) -> None:
        if self._pump:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    while not self._failed and (self._flying.entries or self._pending):
                        await self._change()
            self._pump.cancel()
            await asyncio.wait([self._pump])
        if self._worker:
            with suppress(WorkerDied):
                await self._worker.call("close", timeout=CLOSE_S)
            await self._worker.kill()

    # -- what is where -------------------------------------------------------------------------------------------
    def _entry(self, id: int) -> Entry:
        entry = self._entries.get(id)
        if entry is None or entry.lost:
            raise LookupError(f"group {id} is {'lost with the journal' if entry else 'not in the queue'}")
        return entry

    async def _room(self, id: int, size: int, needs: Callable[[], int | None]) -> float:
        """Wait until so many bytes more may wait; returns for how many seconds. Raises as ``put`` does."""
        began = time.monotonic()
        while self._used + size > self._capacity and (needed := needs()) is not None:
            if needed:
                raise Refused(self._too_small(id, size, needed))
            if not self._told_full:
                self._told_full = True
                self._say(
                    f"the queue is full: {self._used:,} bytes wait for the trainer, and queue.capacity_mib = "
                    f"{self._capacity >> 20}; rollouts wait until it has taken some, here and whenever that comes again"
                )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change(), RETRY_S)  # nobody tells of what the trainer needs by now
        return time.monotonic() - began

    def _too_small(self, id: int, size: int, needed: int) -> str:
        """Of a capacity that the trainer cannot go on with."""
        waiting = sum(not entry.taken for entry in self._entries.values())
        enough = -(-2 * needed * (self._used + size) // (waiting + 1) >> 20)  # for one step while the next is sampled
        return (
            f"the queue is full with {waiting} groups of {self._used:,} bytes in all, group {id} takes {size:,} more, "
            f"and the trainer takes none before {needed} wait: queue.capacity_mib = {self._capacity >> 20} gives room "
            f"for {self._capacity:,} bytes; raise it to {enough} at least, or lower batch.groups"
        )

    def _waits_no_more(self, entry: Entry) -> None:
        if not entry.taken:
            entry.taken = True
            self._used -= entry.size
            self._changed.set()

    def _fits(self, size: int) -> bool:
        """Whether there is memory, made by letting go of what the journal has."""
        self._shed(size)
        return self._held + size <= self._memory or not self._held  # one that is larger than the memory goes alone

    def _shed(self, size: int) -> None:
        while self._held + size > self._memory and (has := self._got or self._resident):
            self._release(has[next(reversed(has))])

    def _release(self, entry: Entry) -> None:
        if entry.held is not None:
            self._held -= entry.size
            entry.held = None
        self._resident.pop(entry.id, None)
        self._got.pop(entry.id, None)

    def _take_in(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._used += entry.size
        self._held += entry.size
        self._pending.append(entry)

    async def _payload(self, size: int) -> Any:
        """What the scratch memory has, where it can wait."""
        with self._scratch.getbuffer() as all, all[:size] as view:
            if size < SMALL:
                return bytes(view)
            return await self._cluster.share(pickle.PickleBuffer(view))

    async def _payloads(self, wanted: list[Entry]) -> AsyncIterator[tuple[Entry, Any]]:
        """Each one's pickle, in any order."""
        held = [(entry, entry.held) for entry in wanted if entry.held is not None]
        absent = [entry for entry in wanted if entry.held is None]
        shared = [(entry, payload) for entry, payload in held if not isinstance(payload, bytes)]
        try:
            values = await self._cluster.fetch([reference for _, reference in shared]) if shared else []
        except WorkerDied:  # with the machine's store; what is written is on disk all the same
            values, absent = [], absent + [entry for entry, _ in shared]
        for entry, payload in held:
            if isinstance(payload, bytes):
                yield entry, payload
        for (entry, _), value in zip(shared, values, strict=False):
            yield entry, value
        for part in parts(absent):
            for entry, value in zip(part, await self._ask("read", [entry.id for entry in part]), strict=True):
                yield entry, value

    # -- the journal ---------------------------------------------------------------------------------------------
    async def _write(self) -> None:
        """Brings the journal what was put and forgotten, as much as came together since the last call."""
        full = False
        try:
            while True:
                if not full:
                    await self._work.wait()
                elif not self._gone:  # what is forgotten may be the room that lacks
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._work.wait(), RETRY_S)
                self._flying, worker = self._batch(), self._worker
                assert worker
                try:
                    done, why = await worker.call("write", *self._flying.args())
                except WorkerDied as error:
                    self._again(0)
                    await self._revive(worker, error)
                    continue
                self._deaths = 0
                self._done(done)
                if bool(why) != full:
                    full = not full
                    self._say(_paused(why, self._folder) if why else ROOM)
        except Exception as error:
            self._fail(error)

    def _batch(self) -> Batch:
        batch, size = Batch(self._gone), 0
        self._gone = []
        while self._pending and size < BATCH and len(batch.entries) < MANY:
            entry = self._pending.popleft()
            if not entry.gone:
                batch.entries.append(entry)
                size += entry.size
        if not self._pending:
            self._work.clear()
        return batch

    def _done(self, count: int) -> None:
        """The first ``count`` of what was under way are written, and all that was forgotten is."""
        for entry in self._flying.entries[:count]:
            entry.written = True
            if not entry.gone:
                self._resident[entry.id] = entry
        self._flying.gone = []
        self._again(count)
        self._shed(0)
        self._changed.set()

    def _again(self, start: int) -> None:
        """Put back what was not written."""
        self._pending.extendleft(reversed(self._flying.entries[start:]))
        self._gone = self._flying.gone + self._gone
        self._flying = Batch()
        if self._pending and not start:
            self._work.set()

    async def _ask(self, method: str, *args: Any) -> Any:
        """A call that is made again where the process died of it, or before."""
        while True:
            worker = self._worker
            assert worker
            try:
                answer = await worker.call(method, *args)
            except WorkerDied as error:
                await self._revive(worker, error)
                continue
            self._deaths = 0
            return answer

    async def _revive(self, dead: Worker, error: BaseException) -> None:
        """A new process in place of ``dead``, unless somebody else has seen to it. Raises where it dies every time."""
        async with self._reviving:
            self._check()
            if self._worker is not dead:
                return
            try:
                await dead.kill()
                while True:
                    self._deaths += 1
                    if self._deaths > DEATHS:
                        raise error
                    self._say(f"{str(error).splitlines()[0]}; it is started again, what it wrote is on disk")
                    try:
                        worker = await self._start()
                        self._reconcile(await self._hello(worker))
                        break
                    except WorkerDied as again:
                        error = again
                self._worker = worker
            except Exception as final:
                self._fail(final)
                raise

    async def _start(self) -> Worker:
        size = min(SEGMENT, max(self._capacity // 16, 1))
        args = (str(self._folder), size, run_id(self._folder.parent))
        return await self._cluster.start(Process("queue", TARGET, args, cpus=0.0, here=True))

    async def _hello(self, worker: Worker) -> dict[int, int]:
        found, damage = await worker.call("open")
        for text in damage:
            self._say(text)
        known: dict[int, int] = found
        return known

    def _reconcile(self, found: dict[int, int]) -> None:
        """Have a new process forget what was forgotten, and write what it lacks; what is written again is new to it."""
        self._gone += [id for id in found if not ((entry := self._entries.get(id)) and entry.written)]
        self._lack([entry for id, entry in self._entries.items() if entry.written and id not in found])

    def _lack(self, entries: list[Entry]) -> None:
        """The journal has them no more: write those again that are in memory."""
        for entry in entries:
            entry.written = False
            self._resident.pop(entry.id, None)
            self._got.pop(entry.id, None)
            entry.lost = entry.held is None
            if entry.lost:
                self._say(f"group {entry.id} is lost with the journal")
            else:
                self._pending.appendleft(entry)
        self._work.set()

    # -- waiting, and giving up ----------------------------------------------------------------------------------
    async def _change(self) -> None:
        self._check()
        self._changed.clear()
        await self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._failed:
            raise self._failed

    def _fail(self, error: BaseException) -> None:
        self._failed = error
        self._changed.set()


def _paused(why: str, folder: Path) -> str:
    return f"the queue waits for room on the disk of {folder} ({why}): free some, and the run goes on"
