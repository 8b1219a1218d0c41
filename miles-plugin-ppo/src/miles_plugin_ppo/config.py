"""The keys of ``[ppo]``. Where implementations of PPO disagree, the key says which of them a value follows."""

from __future__ import annotations

from typing import Any, Literal

from miles_core import Plugin
from miles_core.config import Location
from miles_core.formulas import Aggregate, Estimator
from pydantic import Field


class Config(Plugin.Config):
    """Schulman et al. 2017, arXiv:1707.06347, as language models are trained with it (Ouyang et al. 2022,
    arXiv:2203.02155).

    critic, critic_optim, critic_warmup
        The model that predicts the return, started from the policy's weights with a head of zeros unless ``critic``
        names another folder; the keys of [optim] that it has of its own; the steps in which only it trains.
    gamma, lam, gaps
        Generalized advantage estimation: see ``gae``. ``gaps`` says what tokens between two answers of the policy, a
        tool's for instance, do to it: "skip" (verl) has the estimate of the next token that the policy wrote carried
        over them unchanged; "discount" (OpenRLHF) lets each of them discount it once more, with a value of 0.
    whiten, whiten_variance, whiten_eps
        Advantages to mean 0 and variance 1 over every trained token of the step. The variance is over n - 1 tokens
        (verl) or "biased", over n (OpenRLHF); ``whiten_eps`` is added to it.
    clip_low, clip_high, dual_clip
        The ratio is kept in [1 - clip_low, 1 + clip_high]. ``dual_clip`` bounds the loss of a bad token, see
        ``miles_core.formulas.terms.pessimistic``; off when left out, as everywhere but in verl, which has 3.0.
    value_clip, value_coef
        The value moves at most so far from the old one before its loss stops to fall; 0 turns that off. The squared
        error is multiplied by ``value_coef``: 0.5 as in verl and OpenRLHF, 1.0 as in slime.
    kl, kl_in, kl_estimator, kl_cap, kl_unbiased
        The divergence from the model the run started from, taken off each token's reward or added to the loss. What
        bounds an estimate, and whether a loss is multiplied by the ratio (TRL): see
        ``miles_core.formulas.terms.divergence``.
    kl_target, kl_horizon, kl_mean
        With a target the weight of the divergence is a controller's: see ``controller``; ``kl`` is where it starts. It
        sees a mean over every trained "token" of a step, or over each "sequence", then over sequences (verl).
    aggregate, entropy
        What the policy's loss is a mean over, see ``miles_core.formulas.terms.reduce``; the weight of an entropy bonus.
    """

    critic: Location | None = None
    critic_optim: dict[str, Any] = {}
    critic_warmup: int = Field(0, ge=0)
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    gaps: Literal["skip", "discount"] = "skip"
    whiten: bool = True
    whiten_variance: Literal["unbiased", "biased"] = "unbiased"
    whiten_eps: float = Field(1e-8, gt=0)
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    value_clip: float = Field(0.2, ge=0)
    value_coef: float = Field(0.5, gt=0)
    kl: float = Field(0.0, ge=0)
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Estimator = "k1"
    kl_cap: float | None = Field(None, gt=0)
    kl_unbiased: bool = False
    kl_target: float | None = Field(None, gt=0)
    kl_horizon: int = Field(10_000, gt=0)
    kl_mean: Literal["token", "sequence"] | None = None  # "token"
    aggregate: Aggregate = "token"
    entropy: float = Field(0.0, ge=0)

    def contradictions(self) -> dict[str, str]:
        """Keys that were given but cannot have an effect beside the others, and what to do about each."""
        found = {}
        if self.kl_target is not None and not self.kl:
            found["kl_target"] = "has no effect with kl = 0; say where the weight starts, such as kl = 0.01"
        if self.kl_mean is not None and self.kl_target is None:
            found["kl_mean"] = "has no effect without kl_target, whose controller looks at it; add that or remove this"
        if self.kl_in == "loss" and self.kl and self.kl_estimator == "k1" and not self.kl_unbiased:
            found["kl_estimator"] = 'has no gradient on average as a loss; say "k2" or "k3", or kl_in = "reward"'
        if self.kl_in == "reward" and self.kl and self.kl_unbiased:
            found["kl_unbiased"] = 'has no effect on a reward, whose ratio is 1; remove it, or say kl_in = "loss"'
        return found
