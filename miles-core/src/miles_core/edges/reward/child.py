"""A process that scores, and may be killed: ``python -m miles_core.edges.reward.child FD``, frames on that socket.

The first frame is what to score with, answered by which scorers take a whole group. Each later one is (name, id of
the group, fields of each sample), answered by one outcome a sample as soon as there is one, so that the parent always
knows which sample is being scored. A signal ends a sample that runs over its budget; what no signal reaches, such as
one long loop inside C, the parent ends by killing this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ...types import Group, Sample
from .kinds import Base, Function, LengthPenalty, Math, Outcome, outcome

PR_SET_PDEATHSIG = 1
HEAD = struct.Struct("<Q")  # bytes of the pickle that follows


class OverBudget(BaseException):
    """Not an Exception: a scorer that catches those must not catch this."""


def frame(value: Any) -> bytes:
    data = pickle.dumps(value, protocol=5)
    return HEAD.pack(len(data)) + data


class Call:
    """One scorer, loaded. ``whole``: it takes all samples of a group at once."""

    def __init__(self, scorer: Base, max_tokens: int) -> None:
        self.budget_s, self.stop, self.whole = scorer.budget_s, scorer.on_error == "stop", False
        self._file = ""
        if isinstance(scorer, LengthPenalty):
            self._call: Callable[..., Any] = lambda sample: scorer.worth(sum(sample.mask), max_tokens)
            return
        if isinstance(scorer, Function):
            self._file = str(scorer.file_and_name[0])
            self._call = scorer.load()
            self.whole = next(iter(inspect.signature(self._call).parameters)) == "group"
            return
        if isinstance(scorer, Math):
            import math_verify  # noqa: F401  now, since it takes longer than a sample may

            logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
        assert callable(scorer)
        self._call = scorer

    def score(self, group: Group, tell: Callable[[Outcome], None]) -> None:
        if not self.whole:
            failed = False
            for sample in group.samples:
                if failed and self.stop:
                    tell((None, "was not scored after one at fault"))
                    continue
                value, error = self._budgeted(sample, self.budget_s)
                found = (None, error) if error else outcome(value)
                failed |= found[0] is None
                tell(found)
            return
        size = len(group.samples)
        values, error = self._budgeted(group, self.budget_s * size)
        try:
            values = list(values) if error is None else []
        except TypeError:
            error = f"gave {values!r}, not one number a sample"
        if error is None and len(values) != size:
            error = f"gave {len(values)} values for the {size} samples of group {group.id}"
        for i in range(size):
            tell((None, error) if error else outcome(values[i]))

    def _budgeted(self, given: Any, seconds: float) -> tuple[Any, str | None]:
        """What the scorer returns, or why it does not."""
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                return self._call(given), None
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except OverBudget as error:
            return None, f"ran over its budget of {seconds:g} s{self._line(error)}"
        except Exception as error:
            return None, f"raised {type(error).__name__}: {error}{self._line(error)}"
        except SystemExit as error:
            return None, f"called exit({error.code!r})"

    def _line(self, error: BaseException) -> str:
        """Where in the user's own file it happened."""
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == self._file]
        return f" ({self._file}:{lines[-1]})" if lines else ""


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a scorer that hangs would not see its parent go
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, end this process and no other
    parent = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(parent.fileno(), False)
    frames = parent.makefile("rb")

    def read() -> Any:
        return pickle.loads(frames.read(HEAD.unpack(frames.read(HEAD.size))[0]))

    def alarm(*_: object) -> None:
        raise OverBudget

    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    scorers, max_tokens = read()
    calls: dict[str, Call] = {}
    broken: dict[str, Outcome] = {}
    for name, scorer in scorers.items():
        try:
            calls[name] = Call(scorer, max_tokens)
        except Exception as error:
            broken[name] = None, f"does not load: {type(error).__name__}: {error}"
    parent.sendall(frame({name: call.whole for name, call in calls.items()}))
    with contextlib.suppress(struct.error, BrokenPipeError, ConnectionResetError):  # the parent closed the socket
        while True:
            name, group, views = read()
            if name in calls:
                samples = [Sample(**view) for view in views]
                calls[name].score(Group(group, samples), lambda found: parent.sendall(frame(found)))
            else:
                parent.sendall(frame(broken[name]) * len(views))


if __name__ == "__main__":
    main()
