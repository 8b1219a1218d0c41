"""Of a damaged log, all that can still be relied on, as a log that a run can go on with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .disk import Disk
from .lines import FORMAT, Line, Reader, line, whole
from .replay import Replay, refuse

ASIDE = "log.broken-"
DRAFT = "log.salvaged"


class _Saved:
    """The lines to keep, in order, and which records are among them."""

    def __init__(self, data: bytes, number: int) -> None:
        self.data, self.number = bytearray(data), number
        self.known = [(0, number)]  # ranges of positions whose state can be told
        self.lost: list[tuple[int, int]] = []
        self.seen = number  # the largest number in any whole line

    def offer(self, fields: Line) -> None:
        """Take a whole line from behind the damage where it can stand on what is kept, or by itself."""
        number: int = fields["n"] if "n" in fields else fields.get("after", 0)
        self.seen = max(self.seen, number)
        if "n" not in fields and number > self.number and "state" in fields:
            self.jump(number, fields["state"])
        elif "n" in fields and number == self.number + 1 and self._stands(fields):
            self.data += line(fields)
            self.number = number
            self.known[-1] = (self.known[-1][0], number)

    def jump(self, to: int, state: dict[str, Any]) -> None:
        """Give up the records from here to ``to``; the state after them is ``state``."""
        self.lost.append((self.number + 1, to))
        self.data += line({"after": to, "lost": [self.number + 1, to], "state": state})
        self.number = to
        self.known.append((to, to))

    def _stands(self, fields: Line) -> bool:
        """Whether all that a record refers to is kept."""
        return fields["do"] != "rewind" or any(first <= fields["position"] <= last for first, last in self.known)


def salvage(path: Path) -> list[str]:
    """Put a log that can be read in the place of a damaged one, which stays beside it. Returns what was done, in words.

    Records behind the damage are kept from the next note on: a note repeats the whole state. Numbers of records that
    are lost are never given again, so that no checkpoint is taken for another. Raises Refused while a run writes.
    """
    disk = Disk(path, lambda text: None)  # holds the lock
    try:
        reader = Reader(path)
        for _ in reader:
            pass
        if not reader.rest or reader.torn:
            refuse(reader)
            return [f"{path} is whole: {reader.number} records; there is nothing to salvage"]
        return _replace(path, _collect(reader, path.with_name(DRAFT)), reader)
    finally:
        disk.close()


def _collect(reader: Reader, draft: Path) -> _Saved:
    """Everything worth keeping, also in the file ``draft``, which is whole and on the disk."""
    with reader.path.open("rb") as file:
        data = file.read(reader.end)
    saved, tail = _Saved(data or line({"format": FORMAT, "run": None, "at": 0}), reader.number), 0
    for begin, fields in whole(reader.rest):
        saved.offer(fields)
        tail = reader.rest.index(b"\n", begin) + 1
    unread = reader.rest.count(b"\n", tail)
    if unread or saved.seen > saved.number:  # the end is lost
        draft.write_bytes(saved.data)
        saved.jump(saved.seen + unread + 1, Replay(draft).book.note())
    with draft.open("wb") as out:
        out.write(saved.data)
        out.flush()
        os.fsync(out.fileno())
    Replay(draft)  # raises where it would not open
    return saved


def _replace(path: Path, saved: _Saved, reader: Reader) -> list[str]:
    aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{ASIDE}{n}")).exists())
    shutil.copy2(path, aside)
    os.replace(path.with_name(DRAFT), path)
    said = [f"{path} was damaged at byte {reader.end}, behind record {reader.number}; the broken log is now {aside}"]
    for first, last in saved.lost:
        said.append(f"records {first} to {last} are lost: a checkpoint written at {first} to {last - 1} is of no use")
    said += [] if reader.header else ["the name of the run is lost: the next run that opens the ledger owns it"]
    return [*said, f"all other records are kept; the ledger goes on after record {saved.number}"]
