"""The format of a segment: a label, then records end to end, each a header and a payload.

    magic  8 bytes   |
    format uint32    |  of these three fields ``check`` is the crc32; they stay as they are in every format
    run    32 bytes  |  the run's id, filled up with zeros
    check  uint32

    state  4 bytes   LIVE, or GONE once the record is forgotten: written over it, for which a full disk has room
    id     int64     |
    length uint64    |  little-endian; ``check`` is the crc32 of these three fields, ``crc`` that of the payload
    crc    uint32    |
    check  uint32
    payload of ``length`` bytes

A header that checks is believed wherever it stands, so one damaged record hides no other.
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

FORMAT = 1
MAGIC = b"\x89MQSEG\r\n"
LIVE, GONE = b"\x89MQ\n", b"\x89mq\n"  # two bytes apart: no single damaged byte makes a record forgotten
NAMES, FIELDS, TAIL = struct.Struct("<8sI32s"), struct.Struct("<qQI"), struct.Struct("<I")
LABEL = NAMES.size + TAIL.size
HEADER = len(LIVE) + FIELDS.size + TAIL.size
STATES = re.compile(b"|".join(map(re.escape, (LIVE, GONE))))


@dataclass(frozen=True, slots=True)
class Head:
    id: int
    length: int  # of the payload, in bytes
    crc: int  # of the payload
    gone: bool


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong, and the byte where it begins."""

    at: int
    text: str


@dataclass(slots=True)
class Scan:
    """What a segment holds: whose it is, its whole records by offset, and what is wrong with it, in order."""

    path: Path
    label: tuple[int, str] | None = None  # format and run; None where they cannot be read
    records: list[tuple[int, Head]] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)
    size: int = 0  # bytes


def label(run: str, format: int = FORMAT) -> bytes:
    """The first bytes of a segment."""
    fields = NAMES.pack(MAGIC, format, run.encode())
    return fields + TAIL.pack(zlib.crc32(fields))


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
    found = Scan(path)
    with path.open("rb") as file:
        found.size = os.fstat(file.fileno()).st_size
        if not found.size:
            return found
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            found.label = _label(data)
            end = LABEL if found.label and found.label[0] else 0
            for at, head in _heads(data, end, found.size):
                if at > end:
                    found.flaws.append(Flaw(end, f"no record is in the {at - end} bytes"))
                end = at + HEADER + head.length
                with memoryview(data)[at + HEADER : end] as payload:
                    whole = head.gone or zlib.crc32(payload) == head.crc
                if whole:
                    found.records.append((at, head))
                else:
                    found.flaws.append(Flaw(at, f"the checksum of group {head.id} is wrong"))
    if end < found.size:
        found.flaws.append(Flaw(end, f"no whole record is in the last {found.size - end} bytes"))
    return found


def rewrite(found: Scan, run: str) -> None:
    """Put a segment of the whole records alone in its place, on the disk. Raises OSError, and nothing changed."""
    draft = found.path.with_suffix(".draft")
    try:
        with found.path.open("rb") as old, draft.open("wb") as new:
            new.write(label(run))
            for at, head in found.records:
                if not head.gone:
                    old.seek(at)
                    new.write(old.read(HEADER + head.length))
            new.flush()
            os.fsync(new.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, found.path)


def _label(data: mmap.mmap) -> tuple[int, str] | None:
    """Format and run. A segment that begins with a record is of format 0, which had no label."""
    fields, check = data[: NAMES.size], data[NAMES.size : LABEL]
    if fields.startswith(MAGIC) and TAIL.pack(zlib.crc32(fields)) == check:
        _, format, run = NAMES.unpack(fields)
        return format, run.rstrip(b"\0").decode(errors="replace")
    return (0, "") if parse(data) else None


def _heads(data: mmap.mmap, at: int, size: int) -> Iterator[tuple[int, Head]]:
    """Every header whose payload is there in full, and where; what is no header is stepped over."""
    while at < size:
        head = parse(data, at)
        if head is None:
            at = next((m.start() for m in STATES.finditer(data, at + 1) if parse(data, m.start())), size)
        elif at + HEADER + head.length > size:
            return
        else:
            yield at, head
            at += HEADER + head.length
