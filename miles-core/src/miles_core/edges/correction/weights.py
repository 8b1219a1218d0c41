"""Importance weights between the policy that a step starts from, p, and what the engine sampled from, q."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formulas.terms import bounded, by_update
from ...types import Mean, Weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ...types import Batch
    from . import Correction


@torch.no_grad()
def importance(batch: Batch, config: Correction.Config) -> Weight:
    """``w = p / q`` within its bounds, [T], for the terms of a policy gradient (Ionides 2008, "Truncated importance
    sampling", eq. 3; between engine and trainer: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training").

    - ``token``: of each token alone. ``sequence``: the product over its sequence's tokens, which is the unbiased one,
      of the highest variance. ``geometric``: the mean of the logarithms instead of their sum.
    - ``truncate``: kept within [lower, upper]. ``mask``: 0 outside of it, so that what is too far off is not learned
      from (Ling team 2025, arXiv:2510.18855, "IcePop").

    ``gate`` has other ratios than ``level``'s tell what is masked: with "geometric" tokens keep weights of their own
    where their sequence's is within the bounds.

    Denominators stay what they are: a masked token counts as one that says nothing. With ``denominator`` a mean is over
    what is kept, as if the others were not there: over an update's tokens, or over those of each sequence, as the
    loss's ``aggregate`` says; w is then larger by all / kept.

    By hand, with upper = 2 and log p - log q = (0.5, 1): token w = (1.65, 2), or (1.65, 0) masked, and (3.30, 0) with
    a denominator of the one kept token of two; sequence exp(1.5) = 4.48, hence 2; gated by the geometric mean, which is
    exp(0.75) = 2.12, (0, 0).

    Metrics, means over trained tokens: ``correction/weight`` of w as used, ``correction/outside`` the share beyond a
    bound, ``correction/kl`` the k3 estimate of KL(q || p).
    """
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None  # the check has seen to it
    gap = batch.old_logprobs - batch.rollout_logprobs
    ratio, outside = ratios(gap, batch, config.level), beyond(gap, batch, config)
    if config.outside == "mask":
        factor = torch.where(outside, 0.0, ratio)
    else:
        factor = ratio.clamp(config.lower, config.upper)
    if config.denominator == "token":
        factor = factor * batch.columns["correction_share"]
    elif config.denominator == "sequence":
        factor = factor * batch.per_token(batch.lengths / batch.by_seq((~outside).float()).clamp(min=1))
    near = bounded(gap)
    found = {"weight": factor, "outside": outside, "kl": torch.expm1(near) - near}
    return Weight(factor, {f"correction/{name}": Mean((x * batch.mask).sum()) for name, x in found.items()})


def ratios(gap: Tensor, batch: Batch, level: str) -> Tensor:
    """[T], from ``gap`` = log p - log q of each token."""
    if level != "token":
        summed = batch.by_seq(gap)
        gap = batch.per_token(summed if level == "sequence" else summed / batch.lengths.clamp(min=1))
    return bounded(gap).exp()


def beyond(gap: Tensor, batch: Batch, config: Correction.Config) -> Tensor:
    """[T] bool: a ratio that is not within the bounds."""
    ratio = ratios(gap, batch, config.gate or config.level)
    return (ratio < config.lower) | (ratio > config.upper)


@torch.no_grad()
def share_kept(batches: list[Batch], total: Callable[[Tensor], Tensor], config: Correction.Config) -> None:
    """A column for each micro-batch: the trained tokens of its whole update for each one of them that is kept."""
    kept = []
    for batch in batches:
        assert batch.old_logprobs is not None and batch.rollout_logprobs is not None
        kept.append((~beyond(batch.old_logprobs - batch.rollout_logprobs, batch, config) & batch.mask).sum())
    for batch, n in zip(batches, by_update(batches, kept, total), strict=True):
        share = batch.counts["token"] / n.clamp(min=1)
        batch.columns["correction_share"] = share.float().expand(len(batch.mask))
