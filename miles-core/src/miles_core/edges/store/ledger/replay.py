"""From the lines of a log to the state after its last record, or after an earlier one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ....types import Refused
from ...lasting import LedgerError
from .book import Book
from .lines import FORMAT, Line, Reader, parse, unpack


class Replay:
    """The state that a log leads to. The log is not touched, and may be growing.

    Raises Refused where no ledger is there, where its format is another one, or where it is damaged before its last
    line; LedgerError where a record claims what cannot be.
    """

    def __init__(self, path: Path, until: int | None = None) -> None:
        if not path.is_file():
            raise Refused(f"no ledger is at {path}; is {path.parent.parent} the folder of a run?")
        self.book, self.reader = Book(), Reader(path)
        self.lost: list[tuple[int, int]] = []  # first and last number of records that a salvage could not keep
        self.last: Line = {}  # the record before the end
        self._targets = _targets(path)
        self._saved: dict[int, Book] = {}
        self._remember(0)
        for fields in self.reader:
            self._take(fields)
            if self.reader.number == until:
                break
        refuse(self.reader)

    def _take(self, fields: Line) -> None:
        if "n" not in fields:
            if "lost" in fields:
                self.lost.append(tuple(fields["lost"]))
                self.book = Book.of(fields["state"])
                self._remember(fields["after"])
            return
        if fields["do"] == "rewind":
            position = fields["position"]
            if position not in self._saved:
                raise LedgerError(f"record {fields['n']} rewinds to {position}, which is not in the log")
            self._targets[position] -= 1
            self.book = self._saved[position].copy() if self._targets[position] else self._saved.pop(position)
            self.book.rewind(unpack(fields["kept"]))
        else:
            ids = unpack(fields["ids"])
            self.book.check(fields, ids)
            self.book.apply(fields, ids)
        self.last = fields
        if self._targets:
            self._remember(fields["n"])

    def _remember(self, number: int) -> None:
        if self._targets[number]:
            self._saved[number] = self.book.copy()


def refuse(reader: Reader) -> None:
    """Raises Refused where what was read is not a ledger of this format, or is damaged before its last line."""
    path, rest = reader.path, reader.rest
    run = path.parent.parent
    if reader.header and reader.header["format"] != FORMAT:
        wrote = reader.header["format"]
        raise Refused(f"{path} is written in format {wrote}, and this Miles reads {FORMAT}; use the one that wrote it")
    if rest and not reader.torn:
        number = f"record {reader.number + 1}" if reader.header else "the header"
        raise Refused(
            f"{path} is damaged at byte {reader.end}, where {number} begins; "
            f"what can be saved is saved by: miles audit {run} --salvage"
        )


def state_at(path: Path, position: int) -> Book:
    """The state after record ``position``. Raises Refused where the log does not have it."""
    if position == 0:
        return Book()
    replay = Replay(path, position)
    if replay.reader.number != position:
        raise Refused(
            f"the checkpoint was written at record {position}, which {path} does not have: it ends at "
            f"{replay.reader.number}{', and some before were lost' if replay.lost else ''}; "
            "go on from another checkpoint"
        )
    return replay.book


def _targets(path: Path) -> Counter[int]:
    """How often the records rewind to each position."""
    with path.open("rb") as file:
        found = [parse(text) for text in file if b'"do":"rewind"' in text]
    return Counter(fields["position"] for fields in found if fields)
