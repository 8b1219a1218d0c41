"""Weights from a training rank to the engines through shared memory, for runs on one machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin

if TYPE_CHECKING:
    from ...types import Complain, Transport

MIB = 2**20


class SharedMemory(Plugin):
    class Config(Plugin.Config):
        bucket_mib: int = Field(64, gt=0)  # weights travel in buckets this large at most; each sending rank has two

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if self.run.use.get("transport", "shm") != "shm" or (free := free_bytes()) is None:
            return
        weights = sum(file.stat().st_size for file in self.run.model.path.glob("*.safetensors"))
        if free < (need := min(2 * self.config.bucket_mib * MIB, weights)):
            complain(
                "shm.bucket_mib",
                f"weights want {need // MIB} MiB of shared memory to travel through, {free // MIB} MiB are free; free "
                "some of /dev/shm, or give the container more (docker run --shm-size)",
            )

    @hookimpl
    def miles_transport(self) -> Transport:
        from .shm import SharedMemoryTransport

        return SharedMemoryTransport(self.config.bucket_mib * MIB, self.run.rollout.timeout_s)


def free_bytes() -> int | None:
    """Bytes of shared memory that can still be had, or None where the system does not say."""
    mount = Path("/dev/shm")
    return shutil.disk_usage(mount).free if mount.is_dir() else None
