"""SGLang as the engine: stock servers, to which ``[sglang]`` gives their own arguments under their own names."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..protocols import Engines, Process
from ..sharing import gpu_bytes
from .wire import RECEIVE

if TYPE_CHECKING:
    from ...types import Complain
    from ..protocols import Transport

MASK = 4096  # tokens that it tells could have been drawn, unless it is told otherwise
MIB = 2**20
SPARE = 2  # SGLang ends a response two tokens before the context is full

Value = bool | int | float | str | list[Any] | dict[str, Any]


class SGLang(Plugin):
    """Starts, for each of ``placement.engines``, a process that runs one server, and gives it weights.

    In use where ``placement.layout`` is "colocate" or "split".
    """

    class Config(Plugin.Config):
        """Any argument of SGLang's server, such as ``mem_fraction_static = 0.8`` or ``tp_size = 2``, and Miles' own."""

        model_config = ConfigDict(extra="allow", frozen=True)
        __pydantic_extra__: dict[str, Value]
        start_timeout_s: float = Field(900, gt=0)  # for a server to load its weights and compile its kernels
        bucket_mib: int = Field(512, gt=0)  # weights travel in buckets of this size; each sending rank has two
        verify_every: int = Field(0, ge=-1)  # updates: see whether all weights arrived; 0: with the first, -1: never
        stays: bool = True  # sharing a GPU with a trainer, keep memory while that one trains, as long as both fit

    config: Config

    @property
    def table(self) -> dict[str, Any]:
        """The server's arguments as written."""
        return dict(self.config.model_extra or {})

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if not self._mine():
            return
        from . import arguments

        found = arguments.check(self.table)
        for key, message in found:
            complain(key, message)
        if not found:
            self._check_layout(complain)
            self._check_memory(complain)
        most, draw = self.table.get("sampling_mask_max_tokens", MASK), self.run.rollout
        if draw.top_k > most or (draw.top_p < 1 and not draw.top_k):
            key = "rollout.top_k" if draw.top_k else "rollout.top_p"
            why = "SGLang tells the log-probabilities of what it drew from a cut vocabulary"
            complain(key, f"{why} only for a rollout.top_k of 1 to {most}")

    def _check_memory(self, complain: Complain) -> None:
        from . import arguments, memory

        gpus, size = arguments.gpus(self.table), gpu_bytes(self.run)
        wanted = memory.need(self.run.model.path, self.table, gpus) if gpus and size else None
        fraction = self.table.get("mem_fraction_static")
        if wanted and (wrong := memory.check(wanted, fraction, size)):
            complain("sglang.mem_fraction_static" if fraction else "sglang.tp_size", wrong)

    def _check_layout(self, complain: Complain) -> None:
        from . import arguments

        place, gpus = self.run.placement, arguments.gpus(self.table)
        if place.layout == "cpu" and gpus:
            complain(
                "placement.layout",
                'no GPU is used in layout "cpu"; say "colocate" or "split", or sglang.device = "cpu"',
            )
        if place.layout != "cpu" and not gpus:
            complain("sglang.device", f'"cpu" is for placement.layout = "cpu"; it is {place.layout!r}')
        if (self.run.own | self.run.use)["transport"] == "shm":  # what a run on a CPU has, if it says nothing
            why = "weights in shared memory are for the local engine"
            complain("use.transport", f'{why}; say use.transport = "sglang" beside use.engines = "sglang"')
        if self._keeps and self.table.get("disable_radix_cache"):
            why = 'rollout.weights = "in_place" has requests find what they computed again, in that cache'
            complain("sglang.disable_radix_cache", f'{why}; leave it on, or say "retract"')
        if place.layout == "colocate" and (self.run.max_staleness or self.run.mode == "async"):
            complain(
                "mode", 'trainers and engines that share GPUs take turns: mode = "sync", or placement.layout = "split"'
            )
        if place.layout == "colocate" and place.engines * gpus != place.trainers:
            complain(
                "placement.engines",
                f"{place.engines} engines of {gpus} GPUs each cannot share the GPUs of {place.trainers} trainers; "
                "their products must be equal",
            )

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        if not self._mine():
            return {}
        from importlib.metadata import version

        from . import arguments, memory

        count, gpus = self.run.placement.engines, arguments.gpus(self.table)
        each = f"{gpus} GPU{'s' * (gpus > 1)} each" if gpus else "on the CPU"
        lines = [f"{count} SGLang {version('sglang')} server{'s' * (count > 1)}, {each}"]
        if gpus and (wanted := memory.need(self.run.model.path, self.table, gpus)):
            shared = self.run.placement.layout == "colocate"
            fraction = self.table.get("mem_fraction_static")
            lines.append(memory.explained(wanted, fraction, gpu_bytes(self.run), shared))
        if not self.table.get("enable_deterministic_inference"):
            lines.append("sampling differs from run to run; sglang.enable_deterministic_inference = true repeats it")
        return {"engines": "\n".join(lines)}

    @hookimpl
    def miles_engines(self) -> Engines:
        from . import arguments

        gpus, said = arguments.gpus(self.table), arguments.words(self.table)
        turns = self.run.placement.layout == "colocate"
        processes = [
            Process(
                name=f"engine-{i}",
                target="miles_core.edges.sglang.server:SGLangEngine",
                args=(
                    (*said, *self._own(i, gpus > 0)),
                    self.config.start_timeout_s,
                    self.run.rollout.timeout_s,
                    "nccl" if gpus else "gloo",
                    self._says("vocab_size"),
                    turns,
                    self.config.stays,
                    self._keeps,
                ),
                gpus=0.0 if turns else float(gpus),
                beside=tuple(f"trainer-{i * gpus + j}" for j in range(gpus)) if turns else (),
            )
            for i in range(self.run.placement.engines)
        ]
        client = "KeepingClient" if self._keeps else "StreamingClient" if self._streams else "SGLangClient"
        return Engines(processes, client=f"miles_core.edges.sglang.client:{client}")

    @property
    def _streams(self) -> bool:
        """Whether anything is in flight while weights move."""
        return self.run.mode == "async" and self.run.max_staleness > 0

    @property
    def _keeps(self) -> bool:
        """Whether that goes on over the keys and values of the old weights."""
        return self._streams and self.run.rollout.weights == "in_place"

    @hookimpl
    def miles_transport(self) -> Transport:
        from . import arguments

        gpus, every = arguments.gpus(self.table), self.config.verify_every
        size, limit = self.config.bucket_mib * MIB, self.run.rollout.timeout_s
        if self.run.placement.layout == "colocate":
            from .handles import HandleTransport

            return HandleTransport(gpus, size, limit, every)
        from .broadcast import BroadcastTransport

        return BroadcastTransport(max(gpus, 1), size, limit, every)

    def _own(self, engine: int, gpu: bool) -> tuple[str, ...]:
        """The arguments that Miles sets."""
        own = ["--model-path", str(self.run.model.path), "--skip-tokenizer-init"]
        own += ["--random-seed", str(self.run.seed + engine)]  # else all engines draw the same numbers
        if context := self.run.model.context:
            own += ["--context-length", str(max(context, min(context + SPARE, self._says("max_position_embeddings"))))]
        if "dtype" not in self.table:  # the trainer's; left to itself SGLang serves float32 files in float16
            own += ["--dtype", "bfloat16" if gpu else "float32"]
        if gpu:
            own += ["--enable-memory-saver"]
        if self.run.placement.layout != "colocate":
            own += ["--custom-weight-loader", RECEIVE]
        return tuple(own)

    def _says(self, key: str) -> int:
        """A number in the model's config.json, 0 where there is none."""
        with suppress(OSError, ValueError, TypeError):
            return int(json.loads((self.run.model.path / "config.json").read_text()).get(key, 0))
        return 0

    def _mine(self) -> bool:
        """Whether the run samples with this engine."""
        return (self.run.own | self.run.use)["engines"] == "sglang"
