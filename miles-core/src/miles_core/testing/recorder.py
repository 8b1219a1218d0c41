"""A plugin that answers nothing and writes down every hook call: its place and its name, a line in the run folder.

Async slots are seen too, when they are called: a wrapper of one ends before its body begins, which is soon enough to
take note.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator
from typing import Any

from miles_core import Plugin, hookimpl
from miles_core.config import RunConfig
from miles_core.plugins import SPECS


class Recorder(Plugin):
    def __init__(self, config: Plugin.Config, run: RunConfig) -> None:
        super().__init__(config, run)
        self.place = ""  # of the process that this object is in

    def note(self, hook: str) -> None:
        places = SPECS[hook].places
        if len(places) == 1:  # and one of those comes before any hook that is called in two places
            (self.place,) = places
        if self.run.run_dir is None or not self.run.run_dir.is_dir():
            return  # before the run
        file = os.open(self.run.run_dir / "hooks.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{self.place} {hook}\n".encode())  # one write: lines of several processes do not mix
        os.close(file)


def _watch(hook: str, spec: Any) -> Callable[..., Any]:
    if spec.kind == "slot":

        def around(self: Recorder) -> Generator[None, Any, Any]:
            self.note(hook)
            return (yield)

        around.takes_note = True  # type: ignore[attr-defined]
        return around
    if inspect.iscoroutinefunction(spec):

        async def listen(self: Recorder) -> None:
            self.note(hook)

        return listen

    def hear(self: Recorder) -> None:
        self.note(hook)

    return hear


for _hook, _spec in SPECS.items():
    _mark = hookimpl(wrapper=True) if _spec.kind == "slot" else hookimpl
    setattr(Recorder, _hook, _mark(_watch(_hook, _spec)))
