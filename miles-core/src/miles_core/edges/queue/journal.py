"""The process that keeps the queue's payloads on disk, in segments that are only ever appended to."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

from ..room import FULL
from .disk import claim, promise, promised, sync, sync_again
from .segment import GONE, HEADER, LABEL, header, label, parse, rewrite, scan
from .survey import survey


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

    def __init__(self, folder: str, segment_bytes: int, run: str) -> None:
        """``run`` is the run's id. Raises Refused where another process still writes to ``folder``."""
        self._folder, self._segment_bytes, self._run = Path(folder), segment_bytes, run
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = claim(self._folder)
        self._segments: dict[int, Segment] = {}
        self._spots: dict[int, Spot] = {}
        self._dirty: set[int] = set()
        self._suspect: set[int] = set()  # segments that a sync failed on: who knows what of them is on the disk
        self._active, self._file = 0, -1  # the segment that is appended to, and its descriptor; -1 is none yet

    def open(self) -> tuple[dict[int, int], list[str]]:
        """Ids and sizes in the order they were written, and what was cut from the journal's end, in words.

        Raises Refused, and nothing was changed, where the journal is of another run or format, or is damaged before
        something that a sync promised.
        """
        found = survey(self._folder, self._run)
        found.refuse()
        cut = found.cut()
        self._active = found.promised[0]  # numbers up to it are not given again: it would speak of other bytes
        gone: list[Spot] = []
        for number, one in found.scans.items():
            self._segments[number] = Segment(one.path, one.size)
            self._active = max(self._active, number)
            self._dirty.add(number)
            for at, head in one.records:
                if not head.gone:
                    gone += self._place(head.id, Spot(number, at, head.length))
        self._drop(gone)
        for number in [number for number, segment in self._segments.items() if not segment.live]:
            self._delete(number)
        return {id: spot.length for id, spot in self._spots.items()}, cut

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

    def sync(self) -> tuple[list[int], str]:
        """Make all that was written durable. Returns ids that are lost, and why the rest is not durable yet.

        That is "" or a disk that is full, as only a sync may find out: the kernel may have given up what it could not
        write, and the ids of that are lost here. Raises OSError of another kind.
        """
        lost: list[int] = []
        try:
            for number in sorted(self._suspect & self._segments.keys()):
                lost += self._restore(number)
                self._suspect.discard(number)
            for number in sorted(self._dirty & self._segments.keys()):
                sync(self._segments[number].path)
                self._dirty.discard(number)
            sync(self._folder)
            if self._segments:
                last = max(self._segments)
                promise(self._folder, last, self._segments[last].end)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._suspect |= self._dirty
            return lost, str(error)
        self._dirty.clear()
        self._suspect.clear()
        return lost, ""

    def close(self) -> None:
        """Let another process write here."""
        self._leave()
        os.close(self._lock)
        self._lock = -1

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
        try:
            _write(file, label(self._run), memoryview(b""), 0)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        if self._file >= 0:
            os.close(self._file)
        before, self._active, self._file = self._active, number, file
        self._segments[number] = Segment(path, LABEL)
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
            else:
                self._delete(number)

    def _restore(self, number: int) -> list[int]:
        """Write a segment once more after a sync that failed, without what the kernel lost. Returns the ids of that."""
        path, since = self._segments[number].path, promised(self._folder)
        sync_again(path, since[1] if since[0] == number else 0)
        found = scan(path)
        if not found.flaws:
            return []
        rewrite(found, self._run)
        if number == self._active:
            self._leave()
        before = {id for id, spot in self._spots.items() if spot.segment == number}
        for id in before:
            del self._spots[id]
        now = scan(path)
        self._segments[number] = Segment(path, now.size)
        for at, head in now.records:
            if head.id in before:
                self._drop(self._place(head.id, Spot(number, at, head.length)))
        if not self._segments[number].live:
            self._delete(number)
        return sorted(before - self._spots.keys())

    def _leave(self) -> None:
        """Append to the active segment no more: the next record begins another."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _delete(self, number: int) -> None:
        if number == self._active:
            self._leave()
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
