"""The clipped surrogate of policy gradients, and what a loss is a mean over.

Below, r = p(token) / p_old(token) under the policy now and before the step's first update, and A is the advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..types import Mean

if TYPE_CHECKING:
    from ..types import Batch

Aggregate = Literal["token", "sequence", "constant"]

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
