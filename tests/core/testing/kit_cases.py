"""An algorithm that keeps to everything, and others that each break one thing."""

from __future__ import annotations

from typing import Any

import torch
from miles_core import Plugin, hookimpl
from miles_core.types import Loss, Mean
from pydantic import ConfigDict


class Good(Plugin):
    @hookimpl
    def miles_loss(self, role, batch, output):
        terms = batch.weighed(-batch.columns["advantage"] * output.logprobs) * batch.mask
        return Loss(terms.sum(), "token", {"size": Mean(terms.abs().sum().detach())})


class MeanLoss(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        terms = -batch.columns["advantage"] * output.logprobs * batch.mask
        return Loss(terms.sum() / batch.mask.sum().clamp(min=1), "token")


class MeanMetric(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        loss = super().miles_loss(role, batch, output)
        size = loss.metrics["size"].sum / batch.mask.sum().clamp(min=1)
        return Loss(loss.sum, "token", {"size": Mean(size)})


class PlaceInTheBatch(Good):
    """What a sequence learns depends on which others it is packed with."""

    @hookimpl
    def miles_loss(self, role, batch, output):
        terms = -batch.columns["advantage"] * output.logprobs * batch.mask * (1 + batch.seq)
        return Loss(terms.sum(), "token")


class OfItsOwnRank(Good):
    """Whitens over the tokens of one rank."""

    @hookimpl
    def miles_normalize(self, batches, total):
        tokens = torch.cat([batch.columns["advantage"][batch.mask] for batch in batches])
        for batch in batches:
            batch.columns["advantage"] = batch.columns["advantage"] - (tokens.mean() if len(tokens) else 0.0)


class NanOnEmpty(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        nothing = torch.zeros(()) if len(batch.score) else torch.zeros(()) / 0
        return Loss(super().miles_loss(role, batch, output).sum + nothing, "token")


class NanGradientOnEmpty(Good):
    """Its loss is 0 where nothing is trained on, and its gradient is not: the slope of a square root at 0, times 0."""

    @hookimpl
    def miles_loss(self, role, batch, output):
        spread = (batch.by_seq(output.logprobs).sum() * 0).sqrt() if not batch.mask.any() else 0.0
        return Loss(super().miles_loss(role, batch, output).sum + spread, "token")


class MeanOverLength(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        mean = batch.by_seq(output.logprobs) / batch.lengths
        return Loss(-(batch.score * mean).sum(), "sample")


class Constant(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return Loss(super().miles_loss(role, batch, output).sum.detach(), "token")


class Remembers(Good):
    """A coefficient that changes with the steps, and survives a restart."""

    def __init__(self, config, run):
        super().__init__(config, run)
        self.beta = 1.0

    @hookimpl
    def miles_normalize(self, batches, total):
        self.beta *= 1.5
        for batch in batches:
            batch.columns["advantage"] = batch.columns["advantage"] * self.beta

    @hookimpl
    def miles_state(self):
        return {"beta": self.beta}

    @hookimpl
    def miles_restore(self, state):
        self.beta = state["beta"]


class RestoresNothing(Remembers):
    @hookimpl
    def miles_restore(self, state):
        pass


class TellsNothing(Remembers):
    """Nothing that it remembers is in its state, which therefore survives."""

    @hookimpl
    def miles_state(self):
        return {}

    @hookimpl
    def miles_restore(self, state):
        pass


class ForgetsOnTheDriver(Good):
    """Counts what it was told on the driver, and does not get it back."""

    def __init__(self, config, run):
        super().__init__(config, run)
        self.groups = 0

    @hookimpl
    def miles_group_end(self, group, dropped):
        self.groups += 1

    @hookimpl
    def miles_state(self):
        return {"groups": self.groups}


class TakesAnyKey(Good):
    class Config(Plugin.Config):
        model_config = ConfigDict(extra="allow")


class LosesItsTable(Good):
    class Config(Plugin.Config):
        pair: Any = (1, 2)  # a list once it has been JSON


class ScoresTooFew(Good):
    @hookimpl
    def miles_score(self, groups):
        return [[1.0] for group in groups]


class ScoresNothing(Good):
    @hookimpl
    def miles_score(self, groups):
        return [[float("nan") for sample in group.samples] for group in groups]


class AnswersATensor(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return super().miles_loss(role, batch, output).sum


class AnswersEveryToken(Good):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return Loss(-batch.columns["advantage"] * output.logprobs, "token")
