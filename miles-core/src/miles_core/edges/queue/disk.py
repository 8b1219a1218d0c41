"""What the journal asks of a disk: one writer, bytes that outlive the machine, and a note of which do."""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from pathlib import Path

from ...types import Refused

LOCK_S = 10.0  # for the one that wrote here before to be gone
BLOCK = 1 << 20  # bytes
MARK = "synced"
_mark, _sum = struct.Struct("<8sqq"), struct.Struct("<I")
_magic = b"\x89MQMARK\n"


def claim(folder: Path) -> int:
    """Lock a folder for as long as this process lives. Raises Refused where another one keeps it."""
    file, deadline = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise Refused(f"{folder}: another process of a run writes here; end it first") from None
            time.sleep(0.05)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_again(path: Path, since: int) -> None:
    """After a sync that failed: the kernel may hold bytes for written that are not, until they are written once more.

    Where it has given them up already, what the disk has comes in their place: the reader must check.
    """
    with path.open("r+b", buffering=0) as file:
        handle, at = file.fileno(), since
        while block := os.pread(handle, BLOCK, at):
            done = 0
            while done < len(block):
                done += os.pwrite(handle, block[done:], at + done)
            at += len(block)
        os.fsync(handle)


def promised(folder: Path) -> tuple[int, int]:
    """The last segment that was synced, and the byte up to which; all segments before it were. (0, 0) where unknown."""
    try:
        raw = (folder / MARK).read_bytes()
    except FileNotFoundError:
        return 0, 0
    fields = raw[: _mark.size]
    if len(raw) != _mark.size + _sum.size or _sum.pack(zlib.crc32(fields)) != raw[_mark.size :]:
        return 0, 0
    _, number, end = _mark.unpack(fields)
    return number, end


def promise(folder: Path, number: int, end: int) -> None:
    """Note, durably, what ``promised`` returns. In place: a disk that is full has room for it, but the first time."""
    fields = _mark.pack(_magic, number, end)
    handle = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, fields + _sum.pack(zlib.crc32(fields)), 0)
        os.fsync(handle)
    finally:
        os.close(handle)
