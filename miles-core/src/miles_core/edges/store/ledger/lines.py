"""The lines of the log: eight digits of crc32, a blank, a JSON object. A line is whole, or it says nothing.

The first line is the header. A record has a number ``n``, one more than the record before it. A note has none: it
repeats the whole state ``after`` a record, so that what follows can be read where what came before cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

FORMAT = 1
NAME = "log"

Ids = list[int | list[int]]  # ascending; [a, b] stands for a, a + 1, ... b
Line = dict[str, Any]

_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode  # half the time of json.loads
_start = re.compile(rb'[0-9a-f]{8} \{"')


def line(fields: Line) -> bytes:
    """The bytes that say ``fields``, with the newline that ends them."""
    text = _encode(fields).encode()
    return b"%08x %b\n" % (crc32(text), text)


def parse(text: bytes) -> Line | None:
    """What a line says, or None where it is not whole."""
    if text[:9] != b"%08x " % crc32(text[9:-1]) or text[-1:] != b"\n":
        return None
    fields: Line = _decode(text.decode(), 9)[0]
    return fields


def pack(ids: Iterable[int]) -> Ids:
    """Ids as a record holds them. They may come in any order; one that comes twice stays twice."""
    packed: Ids = []
    first = last = 0
    for id in sorted(ids):
        if id == last + 1 and first:
            last = id
            continue
        if first:
            packed.append(first if first == last else [first, last])
        first = last = id
    if first:
        packed.append(first if first == last else [first, last])
    return packed


def unpack(packed: Ids) -> list[int]:
    """Every id of a record, ascending."""
    ids: list[int] = []
    for item in packed:
        if isinstance(item, list):
            ids += range(item[0], item[1] + 1)
        else:
            ids.append(item)
    return ids


class Reader:
    """Goes through a log from its first byte, one whole line in order at a time, to its end or to the first damage."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size  # what is written from now on is not read
        self.header: Line | None = None
        self.number = 0  # of the last record read
        self.end = 0  # the byte behind the last whole line
        self.rest = b""  # what stands behind it

    def __iter__(self) -> Iterator[Line]:
        """Records and notes. The header is read on the way, and is None afterwards where it is not whole."""
        with self.path.open("rb") as file:
            for text in file:
                end = self.end + len(text)
                fields = parse(text) if end <= self.size else None
                number = self._number(fields) if fields else None
                if fields is None or number is None:
                    self.rest = (text + file.read())[: self.size - self.end]
                    return
                self.end, self.number = end, number
                if self.header:
                    yield fields
                    continue
                self.header = fields
                if fields["format"] != FORMAT:
                    return

    def _number(self, fields: Line) -> int | None:
        """Which record was the last one after a whole line, or None where that line must not stand here."""
        if self.header is None:
            return 0 if "format" in fields else None
        number: int = fields.get("n", 0)
        if number:
            return number if number == self.number + 1 else None
        after: int = fields.get("after", 0)
        lost = fields.get("lost", [self.number + 1, self.number])
        return after if lost == [self.number + 1, after] else None

    @property
    def torn(self) -> bool:
        """Whether the rest is one line that a crash cut short: no whole line follows, and no second one begins."""
        return b"\n" not in self.rest[:-1] and parse(self.rest) is None and not any(True for _ in whole(self.rest, 1))


def whole(rest: bytes, since: int = 0) -> Iterator[tuple[int, Line]]:
    """Every line in ``rest`` that is whole, in order, with the byte it begins at; ``since`` is where to start."""
    while found := _start.search(rest, since):
        begin, end = found.start(), rest.find(b"\n", found.start()) + 1
        if end and (fields := parse(rest[begin:end])):
            yield begin, fields
            since = end
        else:
            since = begin + 1
