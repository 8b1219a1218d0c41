"""Group-relative policy optimization: samples of one prompt are judged against each other, so no critic is needed.

GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and the REINFORCE++ baseline are values of the keys in ``config.Config``.
"""

from __future__ import annotations

import json
from statistics import fmean
from typing import TYPE_CHECKING

from miles_core import Plugin, hookimpl
from miles_core.types import Column, Refused, Role

from .advantages import scores
from .config import Config as Keys

if TYPE_CHECKING:
    from miles_core.types import Batch, Complain, Group, Loss, Mean, Output

SAME_REWARD = 1e-6  # rewards no further apart than this are equal


class GRPO(Plugin):
    class Config(Keys):
        """The keys of ``[grpo]``; ``config.Config`` says what each does."""

    config: Config

    # -- driver --------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        if self.run.batch.group_size < 2 and self.config.alone == "zero":
            message = 'is 1, but grpo compares samples of one prompt; say 2 or more, or grpo.alone = "reward"'
            complain("batch.group_size", message)
        elif self.run.batch.group_size < 2 and self.config.dynamic_sampling:
            message = "would replace every group of one, as its rewards are equal; set it to false"
            complain("grpo.dynamic_sampling", message)
        for key, message in self.config.contradictions().items():
            complain(f"grpo.{key}", message)
        if self.config.entropy and self.run.eval.every and not self.run.placement.engines:
            message = (
                "without engines held-out data is told by its log-probabilities alone; set this or eval.every to 0"
            )
            complain("grpo.entropy", message)

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in self.config if value is not None)
        ref = "a frozen copy of the model the run starts from" if self.config.kl else "none, as kl = 0"
        return {"grpo": keys, "grpo's reference model": ref}

    @hookimpl
    def miles_roles(self) -> dict[str, Role]:
        return {"ref": Role()} if self.config.kl else {}

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        return {"ref_logprobs": Column(role="ref")} if self.config.kl else {}

    @hookimpl
    def miles_drop_group(self, group: Group) -> str | None:
        """DAPO's dynamic sampling: equal rewards have advantage 0, so such a group would only fill up the batch."""
        if not self.config.dynamic_sampling:
            return None
        name = self.config.dynamic_sampling_reward
        if name is None:
            rewards, what = group.rewards, "reward"
        elif name in group.samples[0].rewards:
            rewards, what = [sample.rewards[name] for sample in group.samples], name
        else:
            known = ", ".join(group.samples[0].rewards)
            raise Refused(f"grpo.dynamic_sampling_reward = {name!r} is none of the rewards given: {known}")
        if max(rewards) - min(rewards) <= SAME_REWARD:
            return f"every {what} is {rewards[0]:g}"
        if self.config.dynamic_sampling_range is None:
            return None
        low, high = self.config.dynamic_sampling_range
        inside = low + SAME_REWARD < (mean := fmean(rewards)) < high - SAME_REWARD
        return None if inside else f"the mean {what} is {mean:g}, not between {low:g} and {high:g}"

    @hookimpl
    def miles_score(self, groups: list[Group]) -> list[list[float]]:
        return scores(groups, self.config)

    # -- trainer -------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        from .losses import policy_loss

        if role != "policy":
            raise Refused(f"grpo trains the policy only, and was asked for the loss of {role!r}")
        return policy_loss(batch, output, self.config, self.run.rollout.max_tokens)

    @hookimpl
    def miles_penalty(self, role: str, batch: Batch, output: Output) -> dict[str, Mean]:
        from .losses import penalties

        return penalties(batch, output, self.config, self.run.rollout.max_tokens) if role == "policy" else {}
