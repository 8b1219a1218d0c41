"""Importance weights between the policy that a step starts from, p, and what the engine sampled from, q."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formulas.terms import bounded
from ...types import Mean, Weight

if TYPE_CHECKING:
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

    Denominators stay what they are: a masked token counts as one that says nothing. By hand, with upper = 2 and
    log p - log q = (0.5, 1): token w = (1.65, 2), or (1.65, 0) masked; sequence exp(1.5) = 4.48, hence 2.

    Metrics, means over trained tokens: ``correction/weight`` of w as used, ``correction/outside`` the share beyond a
    bound, ``correction/kl`` the k3 estimate of KL(q || p).
    """
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None  # the check has seen to it
    gap = batch.old_logprobs - batch.rollout_logprobs
    log = gap
    if config.level != "token":
        summed = batch.by_seq(gap)
        log = batch.per_token(summed if config.level == "sequence" else summed / batch.lengths.clamp(min=1))
    ratio = bounded(log).exp()
    outside = (ratio < config.lower) | (ratio > config.upper)
    if config.outside == "mask":
        factor = torch.where(outside, 0.0, ratio)
    else:
        factor = ratio.clamp(config.lower, config.upper)
    near = bounded(gap)
    found = {"weight": factor, "outside": outside, "kl": torch.expm1(near) - near}
    return Weight(factor, {f"correction/{name}": Mean((x * batch.mask).sum()) for name, x in found.items()})
