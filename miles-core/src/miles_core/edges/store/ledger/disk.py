"""The ledger's file: it only grows, is written by one process at a time, and waits for room on a full disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ....types import Refused
from ...room import Room, Tail


class Disk(Tail):
    """``say`` hears when the disk is full, and is not. Raises Refused where another process writes the file."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__(path, Room(say))
        self._lock = os.open(path.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:  # of a file that nobody else opens: to close any handle of it would give the lock back
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise Refused(f"{path} is being written by another process; is the run still alive?") from None
        except OSError:
            pass  # a file system without locks; the run folder is ours by agreement then

    def close(self) -> None:
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1
