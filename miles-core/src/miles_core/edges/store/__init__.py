"""The run folder on a file system: a checkpoint there is whole, or it does not count."""

from __future__ import annotations

from pathlib import Path

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..lasting import Store


class Folder(Plugin):
    @hookimpl
    def miles_store(self, run_dir: Path) -> Store:
        from .folder import RunFolder

        return RunFolder(run_dir, keep=self.run.checkpoint.keep)
