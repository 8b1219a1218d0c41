"""The run folder on a file system: a checkpoint there is whole, or it does not count."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..lasting import Store

if TYPE_CHECKING:
    from ...types import Complain, Role


class Folder(Plugin):
    @hookimpl
    def miles_check(self, complain: Complain, tables: dict[str, Any], roles: dict[str, Role]) -> None:
        every, kept = self.run.checkpoint.every, self.run.checkpoint.keep_every
        if kept and not every:
            complain("checkpoint.keep_every", f"{kept}, but none is written before the last step; set checkpoint.every")
        elif kept % max(every, 1):
            why = f"{kept} is no multiple of checkpoint.every = {every}: most of the steps to keep are never written"
            complain("checkpoint.keep_every", f"{why}; make it {max(round(kept / every), 1) * every}")

    @hookimpl
    def miles_store(self, run_dir: Path) -> Store:
        from .folder import RunFolder

        return RunFolder(run_dir, self.run.checkpoint.keep, self.run.checkpoint.keep_every)
