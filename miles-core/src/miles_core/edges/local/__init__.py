"""The local engine: batched sampling with a KV cache on Hugging Face weights, for machines without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..protocols import Engines, Process
from .architecture import Architecture, Unsupported, architecture, read_config

if TYPE_CHECKING:
    from ...types import Complain

MIB = 2**20


class Local(Plugin):
    class Config(Plugin.Config):
        max_batch: int = Field(512, gt=0)  # rows an engine decodes at once; more requests wait
        kv_mib: int = Field(1024, gt=0)  # most memory of an engine's KV cache; fewer rows where that is not enough
        threads: int = Field(1, gt=0)  # of each engine; on a shared machine two are slower than one

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if not self._mine():
            return
        try:
            arch = architecture(read_config(self.run.model.path))
        except OSError:
            return  # whoever reads the weights says that they are not there
        except Unsupported as error:
            complain("model.path", f"{self.run.model.path}: {error}")
            return
        context = self.run.model.context or arch.context
        if rows_of(arch, context, self.config.max_batch, self.config.kv_mib) < 1:
            need = -(-context * arch.token_bytes // MIB)
            complain(
                "local.kv_mib",
                f"one sequence of {context} tokens takes {need} MiB of KV cache; say {need} or more, or lower "
                "model.context",
            )

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        if not self._mine():
            return {}
        try:
            arch = architecture(read_config(self.run.model.path))
        except (OSError, Unsupported):
            return {}
        context = self.run.model.context or arch.context
        rows = rows_of(arch, context, self.config.max_batch, self.config.kv_mib)
        size = rows * context * arch.token_bytes / MIB
        engines = self.run.placement.engines
        return {
            "engines": f"{engines} local, each {rows} sequences at once of up to {context} tokens, "
            f"{size:,.0f} MiB of KV cache"
        }

    @hookimpl
    def miles_engines(self) -> Engines:
        sizes = (self.run.model.context, self.config.max_batch, self.config.kv_mib)
        args = (str(self.run.model.path), *sizes, self.run.mode == "async" and self.run.rollout.weights == "retract")
        processes = [
            Process(
                name=f"engine-{i}",
                target="miles_core.edges.local.server:LocalEngine",
                args=args,
                cpus=float(self.config.threads),
                threads=self.config.threads,
            )
            for i in range(self.run.placement.engines)
        ]
        streams = self.run.mode == "async" and self.run.max_staleness > 0
        client = "StreamingClient" if streams else "LocalClient"
        return Engines(processes, client=f"miles_core.edges.local.client:{client}")

    def _mine(self) -> bool:
        """Whether the run may sample with this engine at all."""
        return (self.run.own | self.run.use)["engines"] == "local"


def rows_of(arch: Architecture, context: int, max_batch: int, kv_mib: int) -> int:
    """How many sequences of ``context`` tokens fit into ``kv_mib`` MiB of float32 cache, ``max_batch`` at most."""
    return min(max_batch, kv_mib * MIB // (context * arch.token_bytes))
