"""A file that only grows, and that waits for room on a full disk rather than lose or tear what is written to it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from ....types import Refused

FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0  # seconds between two looks at a full disk


class Disk:
    """The end of one file, open for writing by this process alone. ``say`` hears when the disk is full, and is not."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.end, self._say = path, 0, say
        self._named = False  # on the disk itself: a synced file is lost with an unsynced name
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._loose = bytearray()  # written, not synced: after a failed fsync the kernel may have forgotten it
        self._lock = os.open(path.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:  # of a file that nobody else opens: to close any handle of it would give the lock back
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise Refused(f"{path} is being written by another process; is the run still alive?") from None
        except OSError:
            pass  # a file system without locks; the run folder is ours by agreement then

    def cut(self, end: int) -> None:
        """Forget every byte from ``end`` on, and write there next."""
        os.ftruncate(self._fd, end)
        self.end = end

    def append(self, data: bytes) -> None:
        """Returns once all of ``data`` is in the file. Raises OSError, with nothing of it there."""
        try:
            self._write(data, self.end)
        except BaseException:  # an interrupt too: what comes next would stand behind half a line
            os.ftruncate(self._fd, self.end)
            raise
        self.end += len(data)
        self._loose += data

    def sync(self) -> None:
        """Returns once all that was appended is on the disk itself. Raises OSError."""

        def again(full: bool) -> None:
            if full:
                self._write(bytes(self._loose), self.end - len(self._loose))
            os.fsync(self._fd)

        self._insist(again)
        self._loose.clear()
        if not self._named:
            for folder in (self.path.parent, self.path.parent.parent):
                handle = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            self._named = True

    def close(self) -> None:
        for handle in {self._fd, self._lock} - {-1}:
            os.close(handle)
        self._fd = self._lock = -1

    def _write(self, data: bytes, at: int) -> None:
        done = 0

        def rest(full: bool) -> None:
            nonlocal done
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], at + done)

        self._insist(rest)

    def _insist(self, act: Callable[[bool], None]) -> None:
        """``act(False)``; while the disk is full ``act(True)``, every second, until it is not."""
        began = 0.0
        while True:
            try:
                act(began > 0)
                break
            except OSError as error:
                if error.errno not in FULL:
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                if not began:
                    began = time.monotonic()
                    self._say(f"{self.path}: {error.strerror}; the run waits until there is room")
                time.sleep(PAUSE)
        if began:
            self._say(f"{self.path}: there is room again after {time.monotonic() - began:.0f} s; the run goes on")
