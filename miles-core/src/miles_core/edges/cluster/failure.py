"""An exception on its way from the process that raised it to the one that asked."""

from __future__ import annotations

import os
import pickle
import socket
from dataclasses import dataclass
from traceback import TracebackException
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Failure:
    """Returned in place of a result: Ray would wrap an exception that is raised in a second one, and cite it whole."""

    pickled: bytes | None
    text: str  # "Type: message"
    traceback: str  # of the method that failed, and of what caused it
    where: str

    @classmethod
    def of(cls, error: BaseException, name: str, traceback: TracebackType | None) -> Failure:
        """``error`` as raised in the process ``name``. Only an Exception travels: SystemExit must not end the asker."""
        from ray import cloudpickle

        try:
            pickled = cloudpickle.dumps(error) if isinstance(error, Exception) else None
        except Exception:
            pickled = None
        story = TracebackException(type(error), error, traceback)
        story.__notes__ = None  # they travel with the exception itself
        where = f"{name} (pid {os.getpid()} on {socket.gethostname()})"
        return cls(pickled, f"{type(error).__qualname__}: {error}", "".join(story.format()).rstrip(), where)

    def error(self) -> Exception:
        """The exception that was raised, or a RuntimeError with its text where that cannot be rebuilt here.

        Its notes name the process and hold the process's own traceback, also found as ``worker_traceback``.
        """
        try:
            error = pickle.loads(self.pickled) if self.pickled else None
        except Exception:
            error = None
        if not isinstance(error, Exception):
            error = RuntimeError(self.text)
        if not hasattr(error, "worker_traceback"):  # one that came through several processes keeps the first one's
            error.worker_traceback = self.traceback  # type: ignore[attr-defined]
        error.add_note(f"in {self.where}")
        error.add_note(f"traceback in {self.where}:\n{self.traceback}")
        return error
