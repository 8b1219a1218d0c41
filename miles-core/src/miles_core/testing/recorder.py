"""A plugin that answers nothing and writes down which hooks were called: one name a line in the run folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator
from typing import Any

from miles_core import Plugin, hookimpl
from miles_core.plugins import SPECS


class Recorder(Plugin):
    def note(self, hook: str) -> None:
        if self.run.run_dir is None or not self.run.run_dir.is_dir():
            return  # before the run
        file = os.open(self.run.run_dir / "hooks.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{hook}\n".encode())  # one write: lines of several processes do not mix
        os.close(file)


def _watch(hook: str, spec: Any) -> Callable[..., Any] | None:
    if inspect.iscoroutinefunction(spec):
        if spec.kind == "slot":
            return None

        async def listen(self: Recorder) -> None:
            self.note(hook)

        return listen
    if spec.kind == "slot":

        def around(self: Recorder) -> Generator[None, Any, Any]:
            self.note(hook)
            return (yield)

        return around

    def hear(self: Recorder) -> None:
        self.note(hook)

    return hear


for _hook, _spec in SPECS.items():
    if (_watcher := _watch(_hook, _spec)) is not None:
        mark = hookimpl(wrapper=True) if _spec.kind == "slot" else hookimpl
        setattr(Recorder, _hook, mark(_watcher))
