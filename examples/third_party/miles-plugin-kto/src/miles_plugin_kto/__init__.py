"""Kahneman-Tversky optimization: answers that are good or bad, each alone, no pairs (Ethayarajh et al. 2024,
arXiv:2402.01306, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from miles_core import Plugin, hookimpl
from miles_core.types import Column, Loss, Mean, Role
from pydantic import Field

if TYPE_CHECKING:
    from miles_core.types import Batch, Group, Output
    from torch import Tensor


class Kto(Plugin):
    class Config(Plugin.Config):
        beta: float = Field(0.1, gt=0)
        desirable: float = Field(1.0, gt=0)  # weight of the good answers, lambda_D
        undesirable: float = Field(1.0, gt=0)  # and of the bad ones, lambda_U
        threshold: float = 0.5  # an answer with a higher reward is good

    config: Config

    @hookimpl
    def miles_roles(self) -> dict[str, Role]:
        return {"ref": Role()}

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        return {"ref_logprobs": Column(role="ref"), "start_logprobs": Column(role="policy")}

    @hookimpl
    def miles_score(self, groups: list[Group]) -> list[list[float | None]]:
        return [[float(reward > self.config.threshold) for reward in group.rewards] for group in groups]

    @hookimpl
    def miles_normalize(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        """z_0, how far the policy is from the reference; here on the step's own answers, not on mismatched ones."""
        gaps = [b.by_seq(b.columns["start_logprobs"] - b.columns["ref_logprobs"]) for b in batches]
        count = total(sum(gap.new_tensor(len(gap)) for gap in gaps)).clamp(min=1)
        self.z = (total(sum(gap.sum() for gap in gaps)) / count).clamp(min=0)

    @hookimpl
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        assert output.logprobs is not None
        good = batch.score > 0.5
        ahead = self.config.beta * (batch.by_seq(output.logprobs - batch.columns["ref_logprobs"]) - self.z)
        weight = good * self.config.desirable + ~good * self.config.undesirable
        loss = weight * (1 - (ahead * (2 * good.to(ahead.dtype) - 1)).sigmoid())
        return Loss(loss.sum(), "sample", {"accuracy": Mean(((ahead > 0) == good).sum(), "sample")})
