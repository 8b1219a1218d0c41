"""Where scored groups wait between sampling and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin

if TYPE_CHECKING:
    from .. import lasting, protocols


class Queue(Plugin):
    class Config(Plugin.Config):
        memory_mib: int = Field(64, gt=0)  # of the object store; what is over that is on disk alone
        capacity_mib: int = Field(4096, gt=0)  # of groups that wait, on disk

    config: Config

    @hookimpl
    def miles_queue(self, run_dir: Path, cluster: protocols.Cluster, say: Callable[[str], None]) -> lasting.Queue:
        from .queue import JournaledQueue

        return JournaledQueue(cluster, run_dir, self.config.memory_mib << 20, self.config.capacity_mib << 20, say)
