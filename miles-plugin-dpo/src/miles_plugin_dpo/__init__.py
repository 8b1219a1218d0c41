"""Learning from preferences: of two answers to a prompt, one is the better. From data, or from scored attempts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from miles_core import Plugin, hookimpl
from miles_core.types import Column, Loss, Mean, Refused, Role

from .config import Config as Keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_core.types import Batch, Complain, Group, Output, Sample
    from torch import Tensor


WEIGHS = '"both" weighs the terms of a policy gradient, and {} has none; leave it out'


class DPO(Plugin):
    class Config(Keys):
        """The keys of ``[dpo]``; ``config.Config`` says what each does."""

    config: Config

    @property
    def pairs(self) -> int:
        return self.config.pairs or 1

    # -- driver --------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_check(self, complain: Complain, tables: dict[str, Any]) -> None:
        for key, message in self.config.contradictions().items():
            complain(f"dpo.{key}", message)
        given = tables["data"].responses
        if given and len(given) != 2:
            message = f"names {len(given)} columns; dpo takes two, the chosen response first, the rejected one second"
            complain("data.responses", message)
        if given and self.config.pairs is not None:
            complain("dpo.pairs", "has no effect beside data.responses, which holds the pairs; remove one")
        if not given and self.run.batch.group_size < 2 * self.pairs:
            message = f"{self.pairs} take {2 * self.pairs} attempts; batch.group_size is {self.run.batch.group_size}"
            complain("dpo.pairs", message)
        if self.run.batch.old_logprobs == "both":
            complain("batch.old_logprobs", WEIGHS.format("dpo"))

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        keys = "\n".join(f"{key} = {json.dumps(value, default=str)}" for key, value in self.config if value is not None)
        return {"dpo": keys}

    @hookimpl
    def miles_roles(self) -> dict[str, Role]:
        if not self.config.referenced:
            return {}
        folder = self.config.cache or (self.run.run_dir and self.run.run_dir / "reference")
        path = str(self.config.reference) if self.config.reference else None
        return {"ref": Role(path=path, cache=str(folder) if folder else None)}

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        return {"ref_logprobs": Column(role="ref")} if self.config.referenced else {}

    @hookimpl
    def miles_drop_group(self, group: Group) -> str | None:
        if is_given(group) or max(group.rewards) > min(group.rewards):
            return None
        return f"every reward is {group.rewards[0]:g}"

    @hookimpl
    def miles_score(self, groups: list[Group]) -> list[list[float | None]]:
        """1 for a chosen sample, 0 for a rejected one, None for one that is in no pair."""
        scores: list[list[float | None]] = []
        for group in groups:
            found: dict[str, float] = {}
            for chosen, rejected in pairs_of(group, self.pairs):
                found |= {chosen.id: 1.0, rejected.id: 0.0}
            scores.append([found.get(sample.id) for sample in group.samples])
        return scores

    @hookimpl
    def miles_units(self, group: Group) -> list[list[Sample]]:
        return [list(pair) for pair in pairs_of(group, self.pairs)]

    # -- trainer -------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_normalize(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        if self.config.sft_mean == "token":
            from .losses import count_chosen

            count_chosen(batches, total)

    @hookimpl
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        from .losses import preference_loss

        if role != "policy":
            raise Refused(f"dpo trains the policy only, and was asked for the loss of {role!r}")
        return preference_loss(batch, output, self.config)

    @hookimpl
    def miles_penalty(self, role: str, batch: Batch, output: Output) -> dict[str, Mean]:
        from .losses import chosen_nll

        if role != "policy" or not self.config.sft:
            return {}
        nll = chosen_nll(batch, output, self.config)
        return {"penalty/sft": Mean(self.config.sft * nll.sum, nll.per)}


def is_given(group: Group) -> bool:
    """Whether the data holds the responses, so that no weights of this run wrote any."""
    return all(version < 0 for sample in group.samples for version in sample.versions)


def pairs_of(group: Group, most: int) -> list[tuple[Sample, Sample]]:
    """(chosen, rejected): the data's own, or the best attempt with the worst, the second best with the second worst,
    as long as their rewards differ."""
    if is_given(group):
        return [(group.samples[0], group.samples[1])]
    ranked = sorted(group.samples, key=lambda sample: -sample.reward)
    pairs = zip(ranked[:most], reversed(ranked[-most:]), strict=True)
    return [(good, bad) for good, bad in pairs if good.reward > bad.reward]
