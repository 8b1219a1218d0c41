"""The ledger as the driver holds it: every move is a line in the log first, and then the state."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ....types import Refused
from ...lasting import LedgerError
from .book import STATES, Book
from .disk import Disk
from .lines import FORMAT, NAME, line, pack
from .replay import Replay, state_at

NOTE = 1 << 16  # bytes of records before a sync adds a note; more when notes get longer, so that they cost little


class Ledger:
    """See ``miles_core.edges.lasting.Ledger``. Blocking; one writer a folder."""

    def __init__(self, folder: Path, run: str, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self._disk = Disk(self.path, say)
        self._book, self.position, self._due = Book(), 0, NOTE
        try:
            self._open(run, say)
        except BaseException:
            self._disk.close()
            raise

    def _open(self, run: str, say: Callable[[str], None]) -> None:
        replay = Replay(self.path)
        reader = replay.reader
        if reader.header and reader.header["run"] not in (run, None):
            raise Refused(
                f"{self.path} is the ledger of run {reader.header['run']}, and this is run {run}; "
                "give this run a run_dir of its own, or move that folder aside"
            )
        if reader.rest:
            say(f"{self.path}: the last {len(reader.rest)} bytes, half a record {reader.number + 1}, are cut")
        self._disk.cut(reader.end)
        self._book, self.position = replay.book, reader.number
        if reader.header is None:
            self._disk.append(line({"format": FORMAT, "run": run, "at": _now()}))
        self._due = self._disk.end + NOTE

    # -- what is asked -----------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> int:
        return self._book.cursor

    def next(self) -> int:
        return self._book.next()

    def counts(self) -> dict[str, int]:
        return dict(zip(STATES[1:], self._book.counts[1:], strict=True))

    def where(self, id: int) -> tuple[str, str | int | None]:
        return self._book.where(id)

    def reasons(self) -> Counter[str]:
        return self._book.reasons.copy()

    # -- what moves --------------------------------------------------------------------------------------------------

    def lease(self, ids: Iterable[int], to: str) -> None:
        self._move("lease", ids, to=to)

    def queue(self, ids: Iterable[int]) -> None:
        self._move("queue", ids)

    def back(self, ids: Iterable[int], why: str) -> None:
        self._move("back", ids, why=why)

    def drop(self, ids: Iterable[int], why: str) -> None:
        self._move("drop", ids, why=why)

    def give(self, ids: Iterable[int], step: int) -> None:
        self._move("give", ids, step=step)

    def trained(self, step: int) -> None:
        if step not in self._book.given:
            raise LedgerError(f"record {self.position + 1}, 'trained': the trainer holds nothing for step {step}")
        self._move("trained", self._book.given[step], step=step)

    def rewind(self, position: int, step: int, kept: Iterable[int]) -> None:
        book = self._at(position)
        if book.step > step:
            raise LedgerError(f"at record {position} step {book.step} was trained, so no checkpoint of step {step} is")
        queued = book.rewind(kept)
        fields = {"position": position, "step": step, "kept": pack(queued)}
        self._write({"n": self.position + 1, "do": "rewind", **fields, "at": _now()})
        self._book = book

    def _at(self, position: int) -> Book:
        """The state after record ``position``, to change."""
        if position == self.position:
            return self._book.copy()
        return state_at(self.path, position)

    def _move(self, do: str, ids: Iterable[int], **more: Any) -> None:
        moved = sorted(ids)
        if not moved:
            return
        record = {"n": self.position + 1, "do": do, "ids": pack(moved), **more, "at": _now()}
        self._book.check(record, moved)
        self._write(record)
        self._book.apply(record, moved)

    def _write(self, record: dict[str, Any]) -> None:
        self._disk.append(line(record))
        self.position = record["n"]

    # -- the disk ----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        if self._disk.end >= self._due:
            note = line({"after": self.position, "state": self._book.note()})
            self._disk.append(note)
            self._due = self._disk.end + max(NOTE, 2 * len(note), 16 * self.cursor)
        self._disk.sync()

    def close(self) -> None:
        self._disk.close()


def _now() -> float:
    """For a person who reads the log. Nothing depends on it: records are in the order of their numbers."""
    return round(time.time(), 3)
