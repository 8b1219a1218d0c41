from __future__ import annotations
from typing import TYPE_CHECKING
from pydantic import BaseModel, ConfigDict
if TYPE_CHECKING:
    from .config import RunConfig


class Plugin:
    """Base of every plugin: a Config, validated from the table named after the plugin."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, config: Config, run: RunConfig) -> None:
        self.config, self.run = config, run
