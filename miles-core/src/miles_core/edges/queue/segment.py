"""The format of a segment: records end to end, each a header and a payload.

    state  4 bytes   LIVE, or GONE once the record is forgotten: written over it, for which a full disk has room
    id     int64     |
    length uint64    |  little-endian; ``check`` is the crc32 of these three fields, ``crc`` that of the payload
    crc    uint32    |
    check  uint32
    payload of ``length`` bytes

A header that checks is believed wherever it stands, so one damaged record costs itself and no other.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIVE, GONE = b"\x89MQ\n", b"\x89mq\n"  # two bytes apart: no single damaged byte makes a record forgotten
FIELDS, TAIL = struct.Struct("<qQI"), struct.Struct("<I")
HEADER = len(LIVE) + FIELDS.size + TAIL.size
STATES = re.compile(b"|".join(map(re.escape, (LIVE, GONE))))


@dataclass(frozen=True, slots=True)
class Head:
    id: int
    length: int  # of the payload, in bytes
    crc: int  # of the payload
    gone: bool


@dataclass(slots=True)
class Scan:
    """What a segment holds: its records by offset, what is wrong with it, and where its last whole record ends."""

    records: list[tuple[int, Head]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    end: int = 0


def header(id: int, payload: Any) -> bytes:
    fields = FIELDS.pack(id, len(payload), zlib.crc32(payload))
    return LIVE + fields + TAIL.pack(zlib.crc32(fields))


def parse(data: Any, at: int = 0) -> Head | None:
    """The header at an offset, or None where there is none. One whose state alone is damaged counts as live."""
    raw = bytes(data[at : at + HEADER])
    fields = raw[len(LIVE) : -TAIL.size]
    if len(raw) < HEADER or TAIL.pack(zlib.crc32(fields)) != raw[-TAIL.size :]:
        return None
    id, length, crc = FIELDS.unpack(fields)
    return Head(id, length, crc, gone=raw.startswith(GONE))


def scan(path: Path) -> Scan:
    """Read a segment from its beginning to its end, checksums included."""
    found = Scan()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return found
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            for at, head in _heads(data, size):
                if at > found.end:
                    found.damage.append(f"{path}: bytes {found.end} to {at} are no record and are left out")
                found.end = at + HEADER + head.length
                with memoryview(data)[at + HEADER : found.end] as payload:
                    whole = head.gone or zlib.crc32(payload) == head.crc
                if whole:
                    found.records.append((at, head))
                else:
                    found.damage.append(f"{path}: group {head.id} at byte {at} has a wrong checksum and is left out")
    if found.end < size:
        found.damage.append(f"{path}: the last {size - found.end} bytes are no whole record and are cut off")
    return found


def _heads(data: mmap.mmap, size: int) -> Iterator[tuple[int, Head]]:
    """Every header whose payload is there in full, and where; what is no header is stepped over."""
    at = 0
    while at < size:
        head = parse(data, at)
        if head is None:
            at = next((m.start() for m in STATES.finditer(data, at + 1) if parse(data, m.start())), size)
        elif at + HEADER + head.length > size:
            return
        else:
            yield at, head
            at += HEADER + head.length
