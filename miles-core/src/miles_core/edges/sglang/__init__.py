"""SGLang as the engine: stock servers, to which ``[sglang]`` gives their own arguments under their own names."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ..protocols import Engines, Process

if TYPE_CHECKING:
    from ...types import Complain

MASK = 4096  # tokens that it tells could have been drawn, unless it is told otherwise
SPARE = 2  # SGLang ends a response two tokens before the context is full

Value = bool | int | float | str | list[Any] | dict[str, Any]


class SGLang(Plugin):
    """Starts, for each of ``placement.engines``, a process that runs one server; in use by ``engines = "sglang"``."""

    class Config(Plugin.Config):
        """Any argument of SGLang's server, such as ``mem_fraction_static = 0.8`` or ``tp_size = 2``, and Miles' own."""

        model_config = ConfigDict(extra="allow", frozen=True)
        __pydantic_extra__: dict[str, Value]
        start_timeout_s: float = Field(900, gt=0)  # for a server to load its weights and compile its kernels

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

        for key, message in arguments.check(self.table):
            complain(key, message)
        most, draw = self.table.get("sampling_mask_max_tokens", MASK), self.run.rollout
        if draw.top_k > most or (draw.top_p < 1 and not draw.top_k):
            key = "rollout.top_k" if draw.top_k else "rollout.top_p"
            why = "SGLang tells the log-probabilities of what it drew from a cut vocabulary"
            complain(key, f"{why} only for a rollout.top_k of 1 to {most}")

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        if not self._mine():
            return {}
        from importlib.metadata import version

        from . import arguments

        count, gpus = self.run.placement.engines, arguments.gpus(self.table)
        each = f"{gpus} GPU{'s' * (gpus > 1)} each" if gpus else "on the CPU"
        lines = [f"{count} SGLang {version('sglang')} server{'s' * (count > 1)}, {each}"]
        if not self.table.get("enable_deterministic_inference"):
            lines.append("sampling differs from run to run; sglang.enable_deterministic_inference = true repeats it")
        return {"engines": "\n".join(lines)}

    @hookimpl
    def miles_engines(self) -> Engines:
        from . import arguments

        gpus, said = arguments.gpus(self.table), arguments.words(self.table)
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
                ),
                gpus=float(gpus),
            )
            for i in range(self.run.placement.engines)
        ]
        return Engines(processes, client="miles_core.edges.sglang.client:SGLangClient")

    def _own(self, engine: int, gpu: bool) -> tuple[str, ...]:
        """The arguments that Miles sets."""
        own = ["--model-path", str(self.run.model.path), "--skip-tokenizer-init"]
        own += ["--random-seed", str(self.run.seed + engine)]  # else all engines draw the same numbers
        if context := self.run.model.context:
            own += ["--context-length", str(max(context, min(context + SPARE, self._says("max_position_embeddings"))))]
        if gpu:
            own += ["--enable-memory-saver"]
        return tuple(own)

    def _says(self, key: str) -> int:
        """A number in the model's config.json, 0 where there is none."""
        with suppress(OSError, ValueError, TypeError):
            return int(json.loads((self.run.model.path / "config.json").read_text()).get(key, 0))
        return 0

    def _mine(self) -> bool:
        """Whether the run samples with this engine."""
        return self.run.use.get("engines") == "sglang"
