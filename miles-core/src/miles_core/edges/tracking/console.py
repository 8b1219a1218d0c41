"""What a person sees while a run goes on: a line that updates in place, or plain lines where nobody looks."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Literal, TextIO

from ..room import FULL
from .record import Record, duration, printable, timing

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

Mode = Literal["auto", "plain", "off"]
EVERY = 5.0  # seconds between plain progress lines
BAR = 16  # columns
RECENT = 20  # steps whose pace predicts the time left


class Screen:
    """Says nothing: the screen of ``console = "off"``, and what the others derive from."""

    def say(self, text: str, style: str = "") -> None:
        """One line, whole and for good."""

    def progress(self, status: Status) -> None:
        """Where the run stands now."""

    def close(self) -> None:
        """No more progress. The screen can still ``say``."""


def screen(mode: Mode, stream: TextIO | None = None) -> Screen:
    """The screen for ``stream`` (standard output): "auto" updates a line in place on a terminal only."""
    stream = stream or sys.stdout
    if mode == "off":
        return Screen()
    live = mode == "auto" and stream.isatty() and os.environ.get("TERM") != "dumb"
    return Terminal(stream) if live else Plain(stream)


class Status:
    """Where a run stands, in the words of the progress line."""

    def __init__(self, step: int, total: int) -> None:
        self.total, self.step = total, step
        self.numbers: list[str] = []
        self._began = time.monotonic()
        self._ends = deque([self._began], maxlen=RECENT + 1)  # when the recent steps were done

    def update(self, record: Record) -> None:
        """Take in the step that ``record`` ends with."""
        history = record.history
        if history.last > self.step:
            self.step = history.last
            self._ends.append(time.monotonic())
        words = (("reward/mean", "reward {}"), ("eval/accuracy", "accuracy {}"), ("tokens_per_s", "{} tokens/s"))
        found = [(series.values[-1], text) for name, text in words if (series := history.get(name))]
        self.numbers = [text.format(f"{x:,.0f}" if "tokens" in text else f"{x:.3f}") for x, text in found]

    @property
    def words(self) -> list[str]:
        """The step, the numbers known by now, and the time left, most wanted first."""
        return [f"step {self.step:>{len(str(self.total))}}/{self.total}", *self.numbers, self.left]

    @property
    def left(self) -> str:
        now, todo = time.monotonic(), self.total - self.step
        if not todo:
            return f"done in {duration(now - self._began)}"
        if len(self._ends) < 2:
            return f"on the first step for {duration(now - self._ends[-1])}"
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"{duration(pace * todo - (now - self._ends[-1]))} left"


class Plain(Screen):
    """Lines without control characters, a progress line every few seconds. When the reader is gone, silence."""

    def __init__(self, stream: TextIO, every: float = EVERY) -> None:
        self._stream, self._every, self._next = stream, every, 0.0
        self._ends = False

    def say(self, text: str, style: str = "") -> None:
        encoding = self._stream.encoding or "utf-8"
        try:
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)
        except OSError as error:  # a closed pipe or a full disk behind it: no reason to stop training
            if self._ends or error.errno not in FULL:  # else it waits in the stream until there is room
                _hush(self._stream)

    def close(self) -> None:
        self._ends = True

    def progress(self, status: Status) -> None:
        now = time.monotonic()
        if now >= self._next or status.step == status.total:
            self._next = now + self._every
            self.say("  ".join(status.words))


class Terminal(Screen):
    """A line that updates in place, below what was said."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    def say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(text, style), soft_wrap=True)

    def progress(self, status: Status) -> None:
        from rich.live import Live

        if self._live is None:  # redraws itself, between steps too: the time left goes down, so one sees that it lives
            console = self._console
            self._live = Live(get_renderable=lambda: _bar(status, console.width), console=console, refresh_per_second=2)
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _bar(status: Status, width: int) -> Table:
    """One line of at most ``width`` columns: the bar is left out first, then what stands last is cut off."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    step, *rest = status.words
    line = Text("  ".join(rest), no_wrap=True, overflow="ellipsis")
    row = Table.grid(padding=(0, 2))
    if width >= len(step) + BAR + len(line) + 6:
        row.add_column(width=len(step))
        row.add_column(width=BAR)
        row.add_row(Text(step, "bold"), ProgressBar(status.total, status.step, width=BAR), line)
    else:
        row.add_row(Text.assemble((step, "bold"), "  ", line, no_wrap=True, overflow="ellipsis"))
    return row


def _hush(stream: TextIO) -> None:
    """Let what is still written to ``stream``, at exit at the latest, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def summarize(record: Record, to: Screen) -> None:
    """What a run achieved, sampled answers, and where its time went."""
    history, total = record.history, record.run.steps
    done = f"{record.step} of {total} steps in {duration(record.seconds)}"
    if record.error is not None:
        kept = "no checkpoint yet" if record.checkpoint is None else f"newest checkpoint: step {record.checkpoint}"
        to.say(f"\nstopped after {done}; {kept}", "yellow")
        return
    to.say(f"\n{done}", "bold")
    for name, label, note in (("reward/mean", "reward", ""), ("eval/accuracy", "accuracy", "  (held-out)")):
        if ends := history.ends(name):
            to.say(f"{label:<10} {ends[0]:.3f} before, {ends[1]:.3f} after{note}")
    _say_answers(record, to)
    _say_timing(record, to)


def _say_answers(record: Record, to: Screen) -> None:
    if not record.answers:
        return
    to.say(f"\n{len(record.answers)} held-out prompts as answered after step {record.answered}", "bold")
    prompts = [_shown(answer.prompt, 40) for answer in record.answers]
    width = max(map(len, prompts))
    for answer, prompt in zip(record.answers, prompts, strict=True):
        style = {"right": "green", "wrong": "red"}.get(answer.mark, "yellow")
        to.say(f"  {answer.mark:<5}  {prompt:<{width}}  ->  {_shown(answer.response, 60)}", style)


def _say_timing(record: Record, to: Screen) -> None:
    if not (phases := timing(record)):
        return
    to.say("\nwhere the time went", "bold")
    width = max(len(phase.name) for phase in phases)
    for phase in phases:
        share = "" if phase.share is None else f"{phase.share:8.1%}"
        to.say(f"  {phase.name:<{width}} {phase.seconds:>10,.2f} s{share}")
    if record.advice:
        to.say(f"  {record.advice}", "yellow")


def _shown(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    line = printable(text)
    return line if len(line) <= width else line[: width - 3] + "..."
