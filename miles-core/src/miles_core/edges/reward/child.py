"""A process that scores, and may be killed: ``python -m miles_core.edges.reward.child``, frames on stdin and stdout.

The first frame is what to score with; each later one is (name, samples), answered by one (value, error) a sample.
A signal ends a sample that runs over its budget; what no signal reaches, such as a regular expression that backtracks
inside C, the parent ends by killing this process.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from ...types import Sample
from .kinds import Function, LengthPenalty, Scorer

PR_SET_PDEATHSIG = 1
Outcome = tuple[Any, str | None]


class OverBudget(BaseException):
    """Not an Exception: a scorer that catches those must not catch this."""


def write(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def function(scorer: Scorer, max_tokens: int) -> tuple[Callable[..., Any], bool]:
    """What to call, and whether it takes all samples of a group at once."""
    if isinstance(scorer, LengthPenalty):
        return (lambda sample: scorer.worth(sum(sample.mask), max_tokens)), False
    if isinstance(scorer, Function):
        found = scorer.load()
        return found, next(iter(inspect.signature(found).parameters), "") == "group"
    if scorer.kind == "math":
        import math_verify  # noqa: F401  now, since it takes longer than a sample may
    assert callable(scorer)
    return scorer, False


def budgeted(call: Callable[[], Any], seconds: float) -> Outcome:
    """What ``call`` returns, or why it does not."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return call(), None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except OverBudget:
        return None, f"ran over its budget of {seconds:g} s"
    except Exception as error:
        return None, f"raised {type(error).__name__}: {error}"


def score(scorer: Scorer, call: Callable[..., Any], whole: bool, samples: list[Sample]) -> list[Outcome]:
    if not whole:
        return [budgeted(lambda sample=sample: call(sample), scorer.budget_s) for sample in samples]  # type: ignore[misc]
    values, error = budgeted(lambda: list(call(samples)), scorer.budget_s * len(samples))
    return [(None, error)] * len(samples) if error else [(value, None) for value in values]


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody else would end us if our parent were killed
    frames, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scorer prints is no answer

    def alarm(*_: object) -> None:
        raise OverBudget

    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    scorers, max_tokens = read(frames)
    calls, broken = {}, {}
    for name, scorer in scorers.items():
        try:
            calls[name] = function(scorer, max_tokens)
        except Exception as error:
            broken[name] = f"does not load: {type(error).__name__}: {error}"
    write(answers, "ready")
    while True:
        try:
            name, samples = read(frames)
        except EOFError:
            return
        if name in broken:
            write(answers, [(None, broken[name])] * len(samples))
        else:
            write(answers, score(scorers[name], *calls[name], samples))


if __name__ == "__main__":
    main()
