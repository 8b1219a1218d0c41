"""Advantages into gradients, on a training rank: one packed micro-batch at a time, nothing averaged here.

Per-token tensors are [T] float32 and count on ``batch.mask`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from miles_core.formulas.terms import bounded, divergence, pessimistic, reduce
from miles_core.types import Loss, Mean
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_core.types import Batch, Output

    from .config import Config


def policy_loss(batch: Batch, output: Output, config: Config, max_tokens: int) -> Loss:
    """The clipped objective, negated (arXiv:1707.06347, eq. 7), with its metrics: means over trained tokens.

    ``clip/low`` and ``clip/high`` are the shares of tokens that the clip left without a gradient; ``kl/old`` is k3 from
    the policy before the step's first update to the policy now.
    """
    logprobs, old, advantage = output.logprobs, batch.old_logprobs, batch.columns["advantage"]
    assert logprobs is not None and old is not None  # the loop's promise on the stage that computes losses
    gap = bounded(logprobs - old)
    ratio = gap.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    terms = pessimistic(ratio, clipped, advantage, config.dual_clip)
    total = reduce(batch.weighed(terms), batch, config.aggregate, max_tokens)
    with torch.no_grad():
        low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
        found = {
            "clip/low": low & (advantage < 0),
            "clip/high": high & (advantage > 0),
            "ratio/mean": ratio,
            "kl/old": torch.expm1(gap) - gap,
            "advantage/abs": advantage.abs(),
        }
        if config.dual_clip is not None:
            found["clip/dual"] = (ratio > config.dual_clip) & (advantage < 0)
        if "ref_logprobs" in batch.columns:
            found["kl/ref"] = reference_divergence(batch, config, logprobs)
        if output.entropy is not None:
            found["entropy"] = output.entropy
        metrics = {name: Mean((x * batch.mask).sum()) for name, x in found.items()}
    return Loss(total.sum, total.per, metrics)


def value_loss(batch: Batch, output: Output, config: Config) -> Loss:
    """``c max((V - R)^2, (V_old + clip(V - V_old) - R)^2)``, a mean over trained tokens: the clipped value loss of
    the PPO implementation that arXiv:2005.12729, section 3, describes.

    By hand, with V = 2, V_old = 1, R = 3, a clip of 0.2 and c = 0.5: max(1, 1.8^2) / 2 = 1.62. ``clipped`` is the share
    of tokens whose value has moved too far to have a gradient, ``error`` the squared error that the policy's advantages
    were made with.
    """
    values, old, returns = output.values, batch.columns["values"], batch.columns["returns"]
    assert values is not None  # the critic's head says so
    error = (values - returns).square()
    if not config.value_clip:
        worst = error
    else:
        moved = old + (values - old).clamp(-config.value_clip, config.value_clip)
        worst = torch.maximum(error, (moved - returns).square())
    metrics = {
        "clipped": (worst > error),
        "error": (old - returns).square(),
        "value/mean": old,
        "return/mean": returns,
    }
    means = {name: Mean((x * batch.mask).sum().detach()) for name, x in metrics.items()}
    return Loss((config.value_coef * worst * batch.mask).sum(), "token", means)


def token_rewards(batch: Batch, config: Config, beta: float) -> Tensor:
    """[T]: the sample's score on its last trained token, and on every one ``-beta`` times the divergence estimate
    where that is a part of the reward (arXiv:2203.02155, eq. 2, token by token).

    By hand, with a score of 1, beta = 0.1 and estimates of 2, 3 on two trained tokens: -0.2, 0.7."""
    trained = batch.mask.nonzero().squeeze(1)
    of = batch.seq[trained]
    last = torch.cat([of[1:] != of[:-1], batch.mask.new_ones(1)])[: len(of)]
    rewards = torch.zeros_like(batch.columns["values"])
    rewards[trained[last]] = batch.score.to(rewards.dtype)[of[last]]
    if config.kl and config.kl_in == "reward":
        rewards = rewards - beta * reference_divergence(batch, config)
    return rewards * batch.mask


def reference_divergence(batch: Batch, config: Config, logprobs: Tensor | None = None) -> Tensor:
    """[T], from the reference, of the policy with ``logprobs``, or of that which the step started from."""
    old = batch.old_logprobs if config.kl_unbiased and logprobs is not None else None
    logprobs = batch.old_logprobs if logprobs is None else logprobs
    assert logprobs is not None
    return divergence(logprobs, batch.columns["ref_logprobs"], config.kl_estimator, config.kl_cap, old)


@torch.no_grad()
def whiten(batches: list[Batch], total: Callable[[Tensor], Tensor], config: Config) -> None:
    """``(A - mean) / sqrt(var + eps)`` over every trained token of the step, on all data-parallel ranks, in place.

    Two passes, in float64: E[x^2] - E[x]^2 loses what a small variance has. A step of one token has the advantage 0.

    By hand, A = (1, 2, 3) has the mean 2 and the variance 1, hence (-1, 0, 1); "biased" the variance 2 / 3, hence
    (-1.2247, 0, 1.2247).
    """
    columns = [(batch.columns["advantage"], batch.mask) for batch in batches]
    sums = [torch.stack([(a.double() * m).sum(), m.sum().double()]) for a, m in columns]
    summed, count = total(torch.stack(sums).sum(0))
    mean = summed / count.clamp(min=1)
    squares = total(torch.stack([((a.double() - mean).square() * m).sum() for a, m in columns]).sum())
    biased = config.whiten_variance == "biased"
    scale = (squares / (count if biased else count - 1).clamp(min=1) + config.whiten_eps).rsqrt()
    for batch in batches:
        advantage = batch.columns["advantage"]
        batch.columns["advantage"] = (((advantage.double() - mean) * scale) * batch.mask).to(advantage.dtype)
