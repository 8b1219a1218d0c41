"""Writing into the run folder: whole files or none, and errors that a person can act on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..room import Tail

LOOSE = 4 << 20  # bytes that may be not on the disk itself; they are held in memory for as long
HINTS = {
    errno.ENOSPC: "make room, then go on with --resume",
    errno.EDQUOT: "make room, then go on with --resume",
    errno.EACCES: "make the run folder writable, or choose another run_dir",
    errno.EPERM: "make the run folder writable, or choose another run_dir",
    errno.EROFS: "make the run folder writable, or choose another run_dir",
}


@contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Let an OSError say what could not be written, where, and what to do; its class and errno stay."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        raise OSError(error.errno, f"{what} cannot be written: {reason}{hint}", str(path)) from error


def append(file: Tail, data: bytes) -> None:
    """All of ``data``, on a full disk as soon as there is room; to the disk itself from time to time."""
    file.append(data)
    if file.loose > LOOSE:
        file.sync()


def replace(path: Path, text: str) -> None:
    """Write ``path`` so that a reader, or a crash, meets the old file or the new one and nothing between.

    Raises OSError where it cannot be written; the old file is then still there.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
