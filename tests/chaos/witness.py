"""A plugin of the run under test: it writes down which prompts came to which step, apart from the ledger."""

from __future__ import annotations

import json
from pathlib import Path

from miles_core import Plugin, hookimpl
from miles_core.types import Group


class Witness(Plugin):
    class Config(Plugin.Config):
        file: str

    config: Config

    @hookimpl
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        """One line when a step's groups are taken: those to train on, and those dropped since the step before."""
        if not evaluating:
            with Path(self.config.file).open("a") as file:
                file.write(json.dumps([step, [group.id for group in groups]]) + "\n")
        return {}
