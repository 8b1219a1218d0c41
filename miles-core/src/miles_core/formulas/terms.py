"""Terms of losses: the clipped surrogate of policy gradients, divergences, and what a loss is a mean over.

Per-token tensors are [T] float32 and count on ``batch.mask`` only. Below, r = p(token) / p_old(token) under the policy
now and before the step's first update, and A is the advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import Mean

if TYPE_CHECKING:
    from ..types import Batch
    from . import Aggregate, Estimator

# Logarithms of ratios are kept within this, as exp(88) overflows float32 and infinity times a zero gradient is NaN.
# Beyond it the gradient is 0; only a policy that is lost already gets there.
LOG_RATIO_BOUND = 20.0


def bounded(gap: Tensor) -> Tensor:
    """A difference of log-probabilities that can be exponentiated in float32."""
    return gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def pessimistic(ratio: Tensor, clipped: Tensor, advantage: Tensor, dual_clip: float | None) -> Tensor:
    """``-min(r A, clip(r) A)``: Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    That is unbounded where A < 0 and r is large; ``dual_clip`` c bounds it there by ``-c A`` (Ye et al. 2020,
    arXiv:1912.09729, eq. 5). By hand, with r = 3, clip(r) = 1.2 and A = -1: 3, and 2 with c = 2.
    """
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def reduce(x: Tensor, batch: Batch, aggregate: Aggregate, max_tokens: int) -> Mean:
    """The sum of ``x`` [T] that, divided by the count of all micro-batches of all ranks, is a mean

    - ``token``: over all trained tokens (arXiv:2503.14476, eq. 12)
    - ``sequence``: over each sequence's tokens, then over sequences (arXiv:2402.03300, eq. 3)
    - ``constant``: over sequences, of sums divided by ``max_tokens``, so that a long answer does not dilute its tokens
      (arXiv:2503.20783, section 3.2)
    """
    if aggregate == "token":
        return Mean((x * batch.mask).sum(), "token")
    if aggregate == "sequence":
        return Mean((batch.by_seq(x) / batch.lengths.clamp(min=1)).sum(), "sample")
    return Mean((x * batch.mask).sum() / max_tokens, "sample")


def divergence(logprobs: Tensor, ref: Tensor, estimator: Estimator) -> Tensor:
    """[T], estimates of KL(policy || ref) from tokens that the policy drew, with ``x = log p - log p_ref``:

    ``k1 = x``, ``k2 = x^2 / 2``, ``k3 = exp(-x) - 1 + x`` (Schulman 2020, "Approximating KL Divergence"; k3 is eq. 4 of
    arXiv:2402.03300). As a loss on the policy's own samples, k2 has the gradient of the divergence, k3 approximates it
    near the reference, and that of k1 is zero on average: k1 is for rewards, and for comparison.

    By hand, with x = log 2: k1 = 0.6931, k2 = 0.2402, k3 = 0.5 - 1 + 0.6931 = 0.1931.
    """
    x = bounded(logprobs - ref)
    if estimator == "k1":
        return x
    return x.square() / 2 if estimator == "k2" else torch.expm1(-x) + x
