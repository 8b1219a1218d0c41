"""Supervised fine-tuning: the responses that the data holds become more likely. The simplest algorithm there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_core import Plugin, hookimpl
from miles_core.formulas import Aggregate
from miles_core.types import Loss, Mean

from . import WEIGHS

if TYPE_CHECKING:
    from miles_core.types import Batch, Complain, Output


class SFT(Plugin):
    class Config(Plugin.Config):
        aggregate: Aggregate = "token"  # what the loss is a mean over: see miles_core.formulas.terms.reduce

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain, tables: dict[str, Any]) -> None:
        if not tables["data"].responses:
            message = 'sft learns from responses that the data holds; name their column, such as ["response"]'
            complain("data.responses", message)
        if self.run.batch.old_logprobs == "both":
            complain("batch.old_logprobs", WEIGHS.format("sft"))

    @hookimpl
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        """``-log p`` of the tokens after the prompt.

        By hand, with log p = -1, -1 in one response and -4 in another: 2 over tokens, 2.5 over sequences.
        """
        from miles_core.formulas.terms import reduce

        assert output.logprobs is not None
        total = reduce(-output.logprobs, batch, self.config.aggregate, self.run.rollout.max_tokens)
        metrics = {} if output.entropy is None else {"entropy": Mean((output.entropy * batch.mask).sum().detach())}
        return Loss(total.sum, total.per, metrics)
