"""trace.json: what every process did when, for https://ui.perfetto.dev or a browser's tracing page.

The format is Chrome's (Trace Event Format, "JSON Array"): complete events, of processes with one or more tracks each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..room import Room
from .files import explained

NAME, OLDER = "trace.json", "trace-older.json"
WHAT = "the trace of the run"
BEGIN, END = b"[", b"\n]\n"
TAIL = 1 << 16  # bytes at the end, of which a crash can have spoilt the last line
MOST = 256 << 20  # bytes of a file, after which another one is begun and the one before the last is forgotten


class Trace:
    """A file that is whole JSON after each ``flush``, also when the process that wrote it is gone."""

    def __init__(self, run_dir: Path, resumed: bool, room: Room, most: int = MOST) -> None:
        """Open the trace of a run; what a process before wrote stays, if it is ``resumed``.

        Raises OSError naming the file.
        """
        self.path, self._room, self._most = run_dir / NAME, room, most
        self._lines: list[bytes] = []
        self._tracks: dict[str, list[float]] = {}  # of each process: when what it shows ends
        with explained(self.path, WHAT):
            if not (resumed and self.path.exists()):
                room.insist(self.path, lambda full: _begin(self.path))
            elif not room.insist(self.path, lambda full: _close(self.path)):
                room.insist(self.path, lambda full: self._turn())

    def add(self, process: str, doing: str, began: float, ended: float) -> None:
        """Show a stretch of time, in seconds since the epoch, on a track of the process that is free by then."""
        if process not in self._tracks:
            self._tracks[process] = []
            self._lines.append(self._name(process))
        tracks = self._tracks[process]
        free = [i for i, end in enumerate(tracks) if end <= began]
        at = max(free, key=tracks.__getitem__, default=len(tracks))
        tracks[at : at + 1] = [ended]
        start = round(began * 1e6)
        event = {"ph": "X", "name": doing, "ts": start, "dur": max(round(ended * 1e6) - start, 0)}
        self._lines.append(json.dumps(event | self._place(process, at)).encode())

    def flush(self) -> None:
        """Append what was added. Raises OSError naming the file; what was added is then forgotten."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        with explained(self.path, WHAT):
            if self.path.stat().st_size >= self._most:
                self._room.insist(self.path, lambda full: self._turn())
                lines = [self._name(process) for process in self._tracks] + lines
            self._room.insist(self.path, lambda full: self._append(b",\n".join(lines)))

    def _append(self, text: bytes) -> None:
        with self.path.open("r+b", buffering=0) as file:
            end = file.seek(-len(END), os.SEEK_END)
            text = (b"" if end == len(BEGIN) else b",") + b"\n" + text + END
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)  # which makes room for the end
                file.seek(end)
                file.write(END)
                raise

    def _name(self, process: str) -> bytes:
        return json.dumps(
            {"ph": "M", "name": "process_name", "args": {"name": process}} | self._place(process)
        ).encode()

    def _place(self, process: str, track: int = 0) -> dict[str, int]:
        return {"pid": list(self._tracks).index(process) + 1, "tid": track + 1}

    def _turn(self) -> None:
        fresh = self.path.with_name(f"{NAME}.new")
        _begin(fresh)
        os.replace(self.path, self.path.with_name(OLDER))
        os.replace(fresh, self.path)


def _begin(path: Path) -> None:
    path.write_bytes(BEGIN + END)


def _close(path: Path) -> bool:
    """Have the file end as it must: half a line that a crash left is cut off. False where no line is left of it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        tail = file.read()
        at = tail.rfind(b"}")
        while at >= 0 and (tail[at + 1 : at + 2] not in (b",", b"\n", b"") or not _event(tail, at)):
            at = tail.rfind(b"}", 0, at)
        if at < 0:
            return False
        file.seek(size - len(tail) + at + 1)
        file.truncate()
        file.write(END)
    return True


def _event(text: bytes, at: int) -> bool:
    """Whether the line that ends at ``at`` is a whole event."""
    try:
        json.loads(text[text.rfind(b"\n", 0, at) + 1 : at + 1])
    except ValueError:
        return False
    return True
