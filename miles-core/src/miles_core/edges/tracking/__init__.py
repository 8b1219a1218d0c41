"""What a person and a notebook learn of a run: a progress line, metrics.jsonl, TensorBoard, report.html."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..room import Room
from .console import Mode, Screen, Status, screen, summarize
from .metrics import MetricsFile
from .record import Failure, Record, sampled
from .trace import Trace
from .usage import advice

if TYPE_CHECKING:
    from ...config import RunConfig
    from ...types import Group
    from .events import EventFile

Span = tuple[str, str, float, float]  # process, what it did, from when to when, in seconds since the epoch
REPORTING = 0.01  # of the run's time at most goes into writing the report while it goes on


class Tracking(Plugin):
    class Config(Plugin.Config):
        console: Mode = "auto"  # a line that updates in place on a terminal; "plain" never does; "off"
        tensorboard: bool = True  # event files in <run folder>/tensorboard
        trace: bool = True  # <run folder>/trace.json, what every process did when

    config: Config

    def __init__(self, config: Config, run: RunConfig) -> None:
        super().__init__(config, run)
        # Plugins are built in every process, but hooks below are called on the driver alone: open nothing before.
        self._opened: Screen | None = None
        self._room = Room(lambda text: self._screen.say(text, "yellow"))
        self._record: Record | None = None
        self._status: Status | None = None
        self._metrics: MetricsFile | None = None
        self._events: EventFile | None = None
        self._trace: Trace | None = None
        self._spans: list[Span] = []  # since the end of the last step
        self._slower = ""  # side, of which it was told
        self._restored: dict[str, Any] | None = None  # until there is a record to restore it to
        self._evaluated = False  # since the report was written
        self._rested = 0.0  # when it may be written again

    @property
    def _screen(self) -> Screen:
        if self._opened is None:
            self._opened = screen(self.config.console)
        return self._opened

    @hookimpl
    def miles_progress(self, text: str) -> None:
        self._screen.say(text)

    @hookimpl
    def miles_run_start(self, run_dir: Path, step: int) -> None:
        """Raises OSError naming the file where the run folder cannot be written."""
        self._metrics = MetricsFile(run_dir, step, self._room)
        self._record = Record(self.run, run_dir, self._metrics.history, checkpoint=step or None)
        if self._restored is not None:
            self._record.restore(self._restored)
        if self.config.tensorboard:
            from .events import EventFile

            self._events = EventFile(run_dir / "tensorboard", step, self._room)
        if self.config.trace:
            self._trace = Trace(run_dir, resumed=step > 0, room=self._room)
        self._status = Status(step, self.run.steps)
        self._screen.progress(self._status)

    @hookimpl
    def miles_step_end(self, step: int, metrics: dict[str, float]) -> None:
        """Waits where a disk is full; raises OSError naming the file where it cannot be written."""
        if self._metrics is None or self._record is None or self._status is None:
            return
        self._metrics.append(step, metrics)
        if self.run.saves(step):  # once its checkpoint counts the step is never told of again
            self._metrics.sync()
        if self._events is not None:
            self._events.add(step, metrics)
        self._status.update(self._record)
        self._screen.progress(self._status)
        self._take_in(self._record)
        slower, self._record.advice = advice(self._metrics.history, self.run)
        if slower and slower != self._slower:  # told once, with the numbers of then
            self._screen.say(self._record.advice, "yellow")
            self._slower = slower
        if self._evaluated and time.monotonic() >= self._rested:
            self._write_report()

    @hookimpl
    def miles_evaluated(self, step: int, groups: list[Group], metrics: dict[str, float]) -> None:
        if self._record is not None:  # the numbers come again with the end of the step, and then the report is written
            self._record.answers, self._record.answered = sampled(groups, self.run.eval.accuracy), step
            self._evaluated = True

    @hookimpl
    def miles_saved(self, step: int, folder: Path) -> None:
        if self._events is not None:
            self._events.sync()
        if self._record is not None:
            self._record.checkpoint = step

    @hookimpl
    def miles_failure(self, process: str, error: str, action: str) -> None:
        if self._record is not None:
            self._record.failures.append(Failure(self._record.step, process, error, action))
        who = f"{process}: " if process else ""
        self._screen.say(f"{who}{error.strip().splitlines()[0] if error.strip() else 'failed'}; {action}", "yellow")

    @hookimpl
    def miles_span(self, process: str, doing: str, began: float, ended: float) -> None:
        self._spans.append((process, doing, began, ended))

    @hookimpl
    def miles_state(self) -> dict[str, Any]:
        return {"tracking": self._record.state()} if self._record is not None else {}

    @hookimpl
    def miles_restore(self, state: dict[str, Any]) -> None:
        self._restored = state.get("tracking")

    @hookimpl
    def miles_run_end(self, error: BaseException | None) -> None:
        """Raises OSError where the report cannot be written, unless the run failed already: that comes first, and
        nothing waits for room any more."""
        self._screen.close()
        self._room.patient = error is None
        if self._record is None:  # it ended before every process was up
            return
        self._take_in(self._record)
        self._record.ended, self._record.error = True, _told(error)
        summarize(self._record, self._screen)
        try:
            self._screen.say(f"\nreport  {self._write_report()}", "bold")
        except OSError as fault:
            if error is None:
                raise
            self._screen.say(str(fault), "yellow")
        finally:
            for file in (self._metrics, self._events):
                if file is not None:
                    file.close()

    def _take_in(self, record: Record) -> None:
        """Account for what processes did. A trace that cannot be written is no reason to stop training."""
        spans, self._spans = self._spans, []
        for span in spans:
            record.usage.add(*span)
            if self._trace is not None:
                self._trace.add(*span)
        try:
            if self._trace is not None:
                self._trace.flush()
        except OSError as error:
            self._trace = None
            self._screen.say(f"{error}; the run goes on without it", "yellow")

    def _write_report(self) -> Path:
        from .report import write

        assert self._record is not None
        began = time.monotonic()
        path = write(self._record, self._room)
        self._evaluated, self._rested = False, time.monotonic() + (time.monotonic() - began) / REPORTING
        return path


def _told(error: BaseException | None) -> str | None:
    """Why a run ended early, for a person."""
    if error is None:
        return None
    import asyncio  # here, since `miles plugins` is quicker without

    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return "It was interrupted."
    notes = [note for note in getattr(error, "__notes__", ()) if note]
    return "\n".join([f"{type(error).__name__}: {error}", *notes])
