"""Off-policy correction: the engine that drew a token and the trainer that learns from it give it different odds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Column

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ...types import Batch, Complain, Weight


class Correction(Plugin):
    """In use where ``batch.old_logprobs`` is "both"."""

    class Config(Plugin.Config):
        """See ``weights``."""

        level: Literal["token", "sequence", "geometric"] = "token"  # what has one weight; of a sequence product or mean
        outside: Literal["truncate", "mask"] = "truncate"  # what happens to a weight beyond its bounds
        upper: float = Field(2.0, gt=0)
        lower: float = Field(0.0, ge=0)
        gate: Literal["token", "sequence", "geometric"] | None = None  # the weight the bounds are of, if not level's
        denominator: Literal["all", "token", "sequence"] = "all"  # what masked tokens leave of those of a mean

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if self.config.lower > self.config.upper:
            complain("correction.lower", f"{self.config.lower} is above correction.upper = {self.config.upper}")
        if self.run.batch.old_logprobs != "both" and self.config != self.Config():
            complain("correction", 'has no effect without batch.old_logprobs = "both"; say that, or remove it')
        for key in ("gate", "denominator"):
            if self.config.outside == "truncate" and getattr(self.config, key) != getattr(self.Config(), key):
                complain(f"correction.{key}", 'says what is masked, or what that does; say outside = "mask", too')

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        if self.run.mode != "async" or not self.run.max_staleness or self.run.batch.old_logprobs != "recomputed":
            return {}
        told = f"none: tokens up to {self.run.max_staleness} versions old count as if they were new ones"
        return {"correction": f'{told}; batch.old_logprobs = "engine" compares with the weights that drew them'}

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        """How many tokens an update keeps must be known before its first micro-batch: one forward pass more."""
        if self.run.batch.old_logprobs != "both" or self.config.denominator != "token":
            return {}
        return {"correction_logprobs": Column(role="policy")}

    @hookimpl
    def miles_normalize(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        if self.miles_columns():
            from .weights import share_kept

            share_kept(batches, total, self.config)

    @hookimpl
    def miles_token_weight(self, batch: Batch) -> dict[str, Weight]:
        from .weights import importance

        return {"correction": importance(batch, self.config)} if self.run.batch.old_logprobs == "both" else {}
