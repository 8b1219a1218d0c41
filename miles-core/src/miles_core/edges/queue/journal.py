"""The process that keeps the queue's payloads on disk, in segments that are only ever appended to."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

from ...types import Refused
from .segment import GONE, HEADER, header, parse, scan

FULL = {errno.ENOSPC, errno.EDQUOT}  # mended by waiting
LOCK_S = 10.0  # for the one that wrote here before to be gone


@dataclass(slots=True)
class Segment:
    path: Path
    end: int = 0
    live: int = 0  # records


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a record begins, and how long its payload is."""

    segment: int
    at: int
    length: int


class Journal:
    """Payloads by id. Writes reach the page cache, so they outlive the process; ``sync`` has them outlive the machine.

    A record is appended once and never moved. A segment goes when its last record is forgotten: until then it takes
    its whole size on disk, so ids that are kept much longer than their neighbours cost up to ``segment_bytes`` each.
    """

    def __init__(self, folder: str, segment_bytes: int) -> None:
        """Raises Refused where another process still writes to ``folder``."""
        self._folder, self._segment_bytes = Path(folder), segment_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _claim(self._folder / "lock")
        self._segments: dict[int, Segment] = {}
        self._spots: dict[int, Spot] = {}
        self._dirty: set[int] = set()
        self._active, self._file = 0, -1  # the segment that is appended to, and its descriptor; -1 is none yet

    def open(self) -> tuple[dict[int, int], list[str]]:
        """Ids and sizes in the order they were written, and what of the disk's content could not be used."""
        damage: list[str] = []
        gone: list[Spot] = []
        for number, path in sorted((int(path.stem), path) for path in self._folder.glob("*.seg")):
            found = scan(path)
            damage += found.damage
            os.truncate(path, found.end)
            self._segments[number] = Segment(path, found.end)
            self._active = number
            self._dirty.add(number)
            for at, head in found.records:
                if not head.gone:
                    gone += self._place(head.id, Spot(number, at, head.length))
        self._drop(gone)
        for number in [number for number, segment in self._segments.items() if not segment.live]:
            self._delete(number)
        return {id: spot.length for id, spot in self._spots.items()}, damage

    def write(self, gone: list[int], ids: list[int], small: list[Any], *large: Any) -> tuple[int, str]:
        """Forget ``gone``, then append payloads: ``small`` has None for each one that comes as an argument of its own.

        Returns how many are written, and why the rest is not: "" or a disk that is full. Raises OSError of another
        kind. An id that is here already is replaced.
        """
        self._drop([spot for id in gone if (spot := self._spots.pop(id, None))])
        rest, done = iter(large), 0
        try:
            for id, payload in zip(ids, small, strict=True):
                self._append(id, memoryview(next(rest) if payload is None else payload))
                done += 1
        except OSError as error:
            if error.errno not in FULL:
                raise
            return done, str(error)
        return done, ""

    def read(self, ids: list[int]) -> list[PickleBuffer]:
        """Payloads in that order. Raises LookupError of an id that is not here, or no longer what was written."""
        spots = [(id, self._spots.get(id)) for id in ids]
        if lacking := [id for id, spot in spots if spot is None]:
            raise LookupError(f"the journal in {self._folder} has no group {', '.join(map(str, lacking))}")
        payloads = []
        for number, run in groupby(((id, spot) for id, spot in spots if spot), key=lambda pair: pair[1].segment):
            with self._segments[number].path.open("rb", buffering=0) as file:
                payloads += [_payload(file.fileno(), id, spot, file.name) for id, spot in run]
        return payloads

    def sync(self) -> None:
        """Make all that was written durable. Raises OSError where the disk does not take it."""
        for number in sorted(self._dirty & self._segments.keys()):
            _sync(self._segments[number].path)
            self._dirty.discard(number)
        self._dirty.clear()
        _sync(self._folder)

    def close(self) -> None:
        """Let another process write here."""
        if self._file >= 0:
            os.close(self._file)
        os.close(self._lock)
        self._file = self._lock = -1

    def _append(self, id: int, payload: memoryview) -> None:
        if self._file < 0 or self._segments[self._active].end >= self._segment_bytes:
            self._turn()
        segment, head = self._segments[self._active], header(id, payload)
        size = len(head) + len(payload)
        try:
            _write(self._file, head, payload, segment.end)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, segment.end)
            raise
        self._dirty.add(self._active)
        spot = Spot(self._active, segment.end, len(payload))
        segment.end += size
        self._drop(self._place(id, spot))

    def _turn(self) -> None:
        """Begin a new segment."""
        number = self._active + 1
        path = self._folder / f"{number:08d}.seg"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        if self._file >= 0:
            os.close(self._file)
        before, self._active, self._file = self._active, number, file
        self._segments[number] = Segment(path)
        if before in self._segments and not self._segments[before].live:
            self._delete(before)

    def _place(self, id: int, spot: Spot) -> list[Spot]:
        """Remember where ``id`` is now; returns where it was."""
        before = self._spots.pop(id, None)
        self._spots[id] = spot
        self._segments[spot.segment].live += 1
        return [before] if before else []

    def _drop(self, spots: list[Spot]) -> None:
        """Forget records: with their segment where they were its last ones, else by a mark on each."""
        for number, run in groupby(sorted(spots, key=lambda spot: spot.segment), key=lambda spot: spot.segment):
            segment, marks = self._segments[number], [spot.at for spot in run]
            segment.live -= len(marks)
            if segment.live:
                _mark(segment.path, marks)
            elif self._file < 0 or number != self._active:
                self._delete(number)
            else:  # the room is given back, and the segment begins anew
                os.ftruncate(self._file, 0)
                segment.end = 0

    def _delete(self, number: int) -> None:
        self._segments.pop(number).path.unlink(missing_ok=True)


def _write(file: int, head: bytes, payload: memoryview, at: int) -> None:
    """All of it, however often the kernel stops halfway."""
    done, size = os.pwritev(file, [head, payload], at), len(head) + len(payload)
    while done < size:
        left: list[Any] = [payload[done - len(head) :]] if done >= len(head) else [head[done:], payload]
        done += os.pwritev(file, left, at + done)


def _payload(file: int, id: int, spot: Spot, name: str) -> PickleBuffer:
    head, payload = parse(os.pread(file, HEADER, spot.at)), os.pread(file, spot.length, spot.at + HEADER)
    if head is None or (head.id, head.length, head.crc) != (id, len(payload), zlib.crc32(payload)):
        raise LookupError(f"group {id} is damaged: what {name} has at byte {spot.at} is not what was written there")
    return PickleBuffer(payload)  # travels without another copy


def _mark(path: Path, offsets: list[int]) -> None:
    """What is not marked comes back after a restart and is forgotten once more: no reason to fail."""
    with suppress(OSError), path.open("r+b", buffering=0) as file:
        for at in offsets:
            os.pwrite(file.fileno(), GONE, at)


def _claim(path: Path) -> int:
    """Lock a file for as long as this process lives."""
    file, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Refused(f"{path.parent}: another process of a run writes here; end it first") from None
            time.sleep(0.05)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
