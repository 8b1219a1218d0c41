"""What most algorithms want, the numbers of a rollout, and the checks that belong to no other edge."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from ...config import RolloutTable
from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from ...types import Batch, Complain, Group, Sample


class Default(Plugin):
    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        batch = self.run.batch
        if batch.groups % batch.updates:
            fit = [n for n in range(1, batch.groups + 1) if batch.groups % n == 0]
            near = min(fit, key=lambda n: abs(n - batch.updates))
            complain("batch.updates", f"{batch.groups} groups do not divide into {batch.updates} updates; say {near}")
        ahead = batch.updates * batch.epochs
        if (age := ahead * (1 + self.run.max_staleness) - 1) > batch.max_age:
            message = (
                f"the last of {batch.epochs} x {batch.updates} updates learns from tokens drawn {age} updates ago; "
            )
            complain("batch.epochs", message + f"batch.max_age allows {batch.max_age}: lower one or raise the other")
        if self.run.mode != "async":
            fixed = RolloutTable()
            for key in ("max_staleness", "too_old", "weights"):
                if getattr(self.run.rollout, key) != getattr(fixed, key):
                    complain(f"rollout.{key}", f'is for mode = "async", and this is {self.run.mode!r}; remove one')
        elif not self.run.placement.engines:
            complain("mode", "responses are given, so nothing streams: leave it out, or raise placement.engines")
        if self.run.optim.min_lr > self.run.optim.lr:
            complain("optim.min_lr", f"is above optim.lr = {self.run.optim.lr}")
        if self.run.optim.schedule == "constant" and self.run.optim.min_lr:
            complain("optim.min_lr", 'has no effect with optim.schedule = "constant"; remove one')

    @hookimpl
    def miles_score(self, groups: list[Group]) -> list[list[float | None]]:
        return [[sample.reward for sample in group.samples] for group in groups]

    @hookimpl
    def miles_units(self, group: Group) -> list[list[Sample]]:
        return [[sample] for sample in group.samples]

    @hookimpl
    def miles_advantage(self, batch: Batch) -> dict[str, Tensor]:
        return {"advantage": batch.per_token(batch.score)}

    @hookimpl
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        return evaluation(groups, self.run.eval.accuracy) if evaluating else rollouts(groups)

    @hookimpl
    def miles_skip_step(self, role: str, step: int, grad_norm: float) -> str | None:
        return None if math.isfinite(grad_norm) else f"the gradient norm of {role} is {grad_norm}"


def rollouts(groups: list[Group]) -> dict[str, float]:
    """Of every group sampled for a step, those dropped too: filtering must not flatter the rewards.

    ``reward/std`` is the population's; lengths count the tokens that the policy wrote.
    """
    samples = [sample for group in groups for sample in group.samples]
    lengths = [sum(sample.mask) for sample in samples]
    found = {
        "rollout/tokens": float(sum(lengths)),
        "rollout/length": fmean(lengths),
        "rollout/truncated": sum(sample.finish == "length" for sample in samples) / len(samples),
    }
    return found | (rewards(groups, samples) if samples[0].rewards else {})


def rewards(groups: list[Group], samples: list[Sample]) -> dict[str, float]:
    """Of all samples, and by the rewards' names."""
    found = [sample.reward for sample in samples]
    mean = fmean(found)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(fmean((reward - mean) ** 2 for reward in found)),
        "reward/equal_groups": sum(len(set(group.rewards)) == 1 for group in groups) / len(groups),
        **{f"reward/{name}": fmean(sample.rewards[name] for sample in samples) for name in samples[0].rewards},
    }


def evaluation(groups: list[Group], accuracy: str | None) -> dict[str, float]:
    """Means of every reward over the held-out split, unweighted where the reward recorded that.

    Raises Refused when ``accuracy`` names none of them.
    """
    raw: list[dict[str, float]] = [s.rewards | s.info.get("raw_rewards", {}) for g in groups for s in g.samples]
    if accuracy is not None and accuracy not in raw[0]:
        raise Refused(f"eval.accuracy = {accuracy!r} is none of the rewards given: {', '.join(raw[0])}")
    means = {f"eval/{name}": fmean(float(r[name]) for r in raw) for name in raw[0]}
    return means | {"eval/accuracy": means[f"eval/{accuracy or next(iter(raw[0]))}"]}
