"""What to do where a disk is full: say so, wait, and go on where it stopped, so that nothing is lost or torn."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # mended by waiting
PAUSE = 1.0  # seconds between two looks at a full disk, at the least

_ending = False  # the run was told to end while it waited; what else it would write before it is gone does not wait


def waits(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}; the run waits until there is room"


def goes_on(path: Path | str, began: float) -> str:
    """``began``: when the waiting did, on the monotonic clock."""
    return f"{path}: there is room again after {time.monotonic() - began:.0f} s; the run goes on"


class Room:
    """Waits for room in the thread that would write. ``say`` hears when the disk is full, and is not.

    One that is not ``patient`` raises OSError in place of waiting: a run that failed ends.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.patient = say, True

    def insist[T](self, path: Path, act: Callable[[bool], T]) -> T:
        """``act(False)``; while the disk is full ``act(True)``, every second, until it is not.

        Raises CancelledError, as where a run is cancelled, when SIGINT or SIGTERM comes meanwhile, and OSError of any
        other trouble with the path.
        """
        try:
            return act(False)
        except OSError as error:
            began, full = time.monotonic(), self._mendable(error, path)
        with _told() as told:
            self.say(waits(full))  # who reads it may tell the run to end
            while True:
                if told or _ending:
                    _end(path)
                time.sleep(PAUSE)
                try:
                    answer = act(True)
                    break
                except OSError as error:
                    self._mendable(error, path)
        self.say(goes_on(path, began))
        return answer

    def _mendable(self, error: OSError, path: Path) -> OSError:
        named = OSError(error.errno, error.strerror, str(path))
        if error.errno not in FULL or not self.patient:
            raise named from error
        return named


class Tail:
    """The end of a file that only grows, open for writing by this process alone; on a full disk it waits."""

    def __init__(self, path: Path, room: Room) -> None:
        self.path, self._room = path, room
        self._named = False  # on the disk itself: a synced file is lost with an unsynced name
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.end = os.fstat(self._fd).st_size
        self._loose = bytearray()  # written, not synced: after a failed fsync the kernel may have forgotten it

    @property
    def loose(self) -> int:
        """Bytes since the last sync; they are held in memory."""
        return len(self._loose)

    def cut(self, end: int) -> None:
        """Forget every byte from ``end`` on, and write there next."""
        os.ftruncate(self._fd, end)
        self.end = end

    def append(self, data: bytes) -> None:
        """Returns once all of ``data`` is in the file. Raises OSError, with nothing of it there."""
        try:
            self._write(data, self.end)
        except BaseException:  # an interrupt too: what comes next would stand behind half a line
            with suppress(OSError):  # failing already; half a record is cut when the run goes on
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

        self._room.insist(self.path, again)
        self._loose.clear()
        if not self._named:
            for folder in (self.path.parent, self.path.parent.parent):
                sync(folder)
            self._named = True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _write(self, data: bytes, at: int) -> None:
        done = 0

        def rest(full: bool) -> None:
            nonlocal done
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], at + done)

        self._room.insist(self.path, rest)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError say where it was: one of a write has no name of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or path)) from error


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself. Raises OSError naming the path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def _end(path: Path) -> None:
    from asyncio import CancelledError  # here, since `miles status` is quicker without

    global _ending
    _ending = True
    raise CancelledError(f"{path}: the run was told to end while it waited for room")


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
