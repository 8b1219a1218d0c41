"""A plugin that answers with the cluster of ``threads``."""

from __future__ import annotations

from pathlib import Path

from miles_core import Plugin, hookimpl
from miles_core.edges.protocols import Cluster
from miles_core.testing.threads import Threads


class Inline(Plugin):
    @hookimpl
    def miles_cluster(self, run_dir: Path) -> Cluster:
        return Threads()
