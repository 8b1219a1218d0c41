"""Weights from a training rank to the engines through shared memory, for runs on one machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin

if TYPE_CHECKING:
    from ...types import Complain
    from ..protocols import Transport


class SharedMemory(Plugin):
    class Config(Plugin.Config):
        bucket_mib: int = Field(64, gt=0)  # weights travel in buckets of this size; each sending rank has two

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if (self.run.own | self.run.use)["transport"] == "shm" and not hasattr(os, "memfd_create"):
            complain("use.transport", "shm needs Linux: weights travel through memory that memfd_create gives")

    @hookimpl
    def miles_transport(self) -> Transport:
        from .shm import SharedMemoryTransport

        return SharedMemoryTransport(self.config.bucket_mib * 2**20, self.run.rollout.timeout_s)
