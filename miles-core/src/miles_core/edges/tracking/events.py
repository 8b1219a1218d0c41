"""TensorBoard event files, written by the tensorboard package alone: the driver imports no torch for them."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from ..room import Room, Tail
from .files import append, explained

WHAT = "the TensorBoard events"


class EventFile:
    """One event file of this process. Written in the calling thread, so that an error surfaces where it happens, and
    a record that a full disk has no room for is waited with, not torn."""

    def __init__(self, folder: Path, step: int, room: Room) -> None:
        """Open a new file for a run of which ``step`` steps are done.

        Earlier files in ``folder`` stay; TensorBoard is told to forget what they hold of steps that run again. Raises
        OSError naming the file.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        with explained(self.path, WHAT):
            room.insist(folder, lambda full: folder.mkdir(parents=True, exist_ok=True))
            again = any(folder.glob("events.out.tfevents.*"))
            self._file = room.insist(self.path, lambda full: Tail(self.path, room))
        self._record = io.BytesIO()
        self._records = RecordWriter(self._record)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if again:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(self._event(wall_time=time.time(), step=step + 1 if step else 0, session_log=start))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one step. Raises OSError naming the file."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def sync(self) -> None:
        """Make every record so far outlive a power cut."""
        with explained(self.path, WHAT):
            self._file.sync()

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
        record = self._record.getvalue()
        self._record.seek(0)
        self._record.truncate()
        with explained(self.path, WHAT):
            append(self._file, record)

    def close(self) -> None:
        self._file.close()
