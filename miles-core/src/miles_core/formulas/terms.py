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
    from collections.abc import Callable, Sequence

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

    >>> r, clipped, A = torch.tensor([3.0]), torch.tensor([1.2]), torch.tensor([-1.0])
    >>> pessimistic(r, clipped, A, None).item(), pessimistic(r, clipped, A, 2.0).item()
    (3.0, 2.0)
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

    By hand, with x = 1, 1 on a sequence of two tokens and 4 on one of one: 6 / 3 = 2 over tokens, (1 + 4) / 2 = 2.5
    over sequences, and (2 / 4 + 4 / 4) / 2 = 0.75 with ``max_tokens`` 4.
    """
    if aggregate == "token":
        return Mean((x * batch.mask).sum(), "token")
    if aggregate == "sequence":
        return Mean((batch.by_seq(x) / batch.lengths.clamp(min=1)).sum(), "sample")
    return Mean((x * batch.mask).sum() / max_tokens, "sample")


def divergence(
    logprobs: Tensor, ref: Tensor, estimator: Estimator, cap: float | None = None, old: Tensor | None = None
) -> Tensor:
    """[T], estimates of KL(policy || ref) from tokens that the policy drew, with ``x = log p - log p_ref``:

    ``k1 = x``, ``k2 = x^2 / 2``, ``k3 = exp(-x) - 1 + x`` (Schulman 2020, "Approximating KL Divergence"; k3 is eq. 4 of
    arXiv:2402.03300). As a loss on the policy's own samples, k2 has the gradient of the divergence, k3 approximates it
    near the reference, and that of k1 is zero on average: k1 is for rewards, and for comparison.

    With ``cap`` an estimate is kept within [-cap, cap], and has no gradient beyond. With ``old`` [T], log p_old, it is
    multiplied by p / p_old, gradient and all: then k1 and k3, and their gradients, have the divergence and its gradient
    as their means, however far the policy has moved from p_old, which drew the tokens (DeepSeek-AI 2025,
    arXiv:2512.02556, section 3.1).

    By hand, with x = log 2: k1 = 0.6931, k2 = 0.2402, k3 = 0.5 - 1 + 0.6931 = 0.1931; with a cap of 0.1 each is 0.1;
    with p_old = p / 3 each is three times as much.

    >>> p, ref = torch.tensor([0.8]).log(), torch.tensor([0.4]).log()
    >>> [round(divergence(p, ref, k).item(), 4) for k in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    >>> round(divergence(p, ref, "k3", cap=0.1).item(), 4)
    0.1
    >>> round(divergence(p, ref, "k3", old=(p.exp() / 3).log()).item(), 4)
    0.5794
    """
    x = bounded(logprobs - ref)
    if estimator == "k1":
        found = x
    else:
        found = x.square() / 2 if estimator == "k2" else torch.expm1(-x) + x
    if cap is not None:
        found = found.clamp(-cap, cap)
    return found if old is None else found * bounded(logprobs - old).exp()


def by_update(batches: Sequence[Batch], numbers: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
    """[B], for each of a step's micro-batches the sum of ``numbers``, a scalar each, over all of its update's: those of
    the other data-parallel ranks too, which ``total`` adds up. For ``miles_normalize``, where denominators of a
    plugin's own are known.

    By hand, of three micro-batches, the last one another update's, with the numbers 1, 2 and 5: 3, 3 and 5.

    >>> from types import SimpleNamespace
    >>> first, second = {"token": 10}, {"token": 10}
    >>> rows = [SimpleNamespace(counts=counts) for counts in (first, first, second)]
    >>> by_update(rows, torch.tensor([1, 2, 5]), lambda sums: sums).tolist()
    [3.0, 3.0, 5.0]
    """
    updates = list({id(batch.counts): None for batch in batches})  # an update's batches share its denominators
    place = torch.tensor([updates.index(id(batch.counts)) for batch in batches])
    each = torch.stack(list(numbers)).double()
    place = place.to(each.device)
    return total(each.new_zeros(len(updates)).index_add(0, place, each)).index_select(0, place)
