"""A file that only grows, and that waits for room on a full disk rather than lose or tear what is written to it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....types import Refused

FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0  # seconds between two looks at a full disk


class Disk:
    """The end of one file, open for writing by this process alone. ``say`` hears when the disk is full, and is not."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.end, self._say = path, 0, say
        self._ending = False  # the run was told to end while the disk was full
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
        """``act(False)``; while the disk is full ``act(True)``, every second, until it is not.

        Raises CancelledError, as where a run is cancelled, when SIGINT or SIGTERM comes meanwhile.
        """
        try:
            act(False)
            return
        except OSError as error:
            self._refuse(error)
            began = time.monotonic()
            self._say(f"{self.path}: {error.strerror}; the run waits until there is room")
        with _told() as told:
            while True:
                if told or self._ending:
                    self._ending = True  # what else the run would write before it is gone does not wait once more
                    self._end()
                time.sleep(PAUSE)
                try:
                    act(True)
                    break
                except OSError as error:
                    self._refuse(error)
        self._say(f"{self.path}: there is room again after {time.monotonic() - began:.0f} s; the run goes on")

    def _refuse(self, error: OSError) -> None:
        if error.errno not in FULL:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _end(self) -> None:
        from asyncio import CancelledError  # here, since `miles status` is quicker without

        raise CancelledError(f"{self.path}: the run was told to end while it waited for room")


@contextmanager
def _told() -> Iterator[list[int]]:
    """Signals to end that came meanwhile, in the main thread.

    An event loop hears of SIGTERM only at its next turn, and it gets none while its thread waits here. Its own handler
    is called all the same. One that is not Python's ends the process by itself, or is meant to be ignored.
    """
    told: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in found.items() if callable(handler)}

    def hear(number: int, frame: Any) -> None:
        told.append(number)
        before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, hear)
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
