"""Pairs into gradients, on a training rank: one packed micro-batch at a time, nothing averaged here.

Below, c and r are the chosen and the rejected side of a pair, log p(y) is the sum over the trained tokens of a side,
h = (log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r)), b is ``beta`` and e ``label_smoothing``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from miles_core.formulas.terms import by_update
from miles_core.types import Loss, Mean
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_core.types import Batch, Output

    from .config import Config


class Sides(NamedTuple):
    """A value of each pair's two sides, both [P]."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        return torch.sub(self.chosen, self.rejected)


def sides(batch: Batch, x: Tensor) -> Sides:
    """[S], a value of each sequence, as pairs: the side with score 1 is the chosen one, wherever it stands."""
    chosen = batch.score > 0.5
    pairs = len(batch.score) // 2

    def of(which: Tensor) -> Tensor:
        return x.new_zeros(pairs).index_add(0, batch.unit[which], x[which])

    return Sides(of(chosen), of(~chosen))


def pair_losses(policy: Sides, reference: Sides, lengths: Sides, config: Config) -> Tensor:
    """[P], from log p and log p_ref of both sides and their trained tokens.

    - ``sigmoid``: ``-(1 - e) log s(b h) - e log s(-b h)``: arXiv:2305.18290, eq. 7; with e it is "conservative DPO"
      (Mitchell 2023, eq. 3)
    - ``ipo``: ``(h - 1 / (2 b))^2``: Azar et al. 2023, arXiv:2310.12036, eq. 17
    - ``hinge``: ``max(0, 1 - b h)``: Zhao et al. 2023, arXiv:2305.10425, with the reference of arXiv:2309.06657
    - ``robust``: ``(-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e)``: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12
    - ``exo_pair``: ``s(b h) (log s(b h) - log(1 - e)) + s(-b h) (log s(-b h) - log e)``: Ji et al. 2024,
      arXiv:2402.00856, eq. 16
    - ``simpo``: ``-log s(b log p(c) / |c| - b log p(r) / |r| - m)`` with ``margin`` m: Meng et al. 2024,
      arXiv:2405.14734, eq. 6

    By hand, with b = 0.1, log p = -1 and -4, log p_ref = -2 and -3, on 2 and 4 tokens: h = 1 + 1 = 2, so b h = 0.2.
    sigmoid 0.5981, ipo (2 - 5)^2 = 9, hinge 0.8. With e = 0.1 robust is (0.9 * 0.5981 - 0.1 * 0.7981) / 0.8 = 0.5731,
    exo_pair 0.5498 * (-0.5981 + 0.1054) + 0.4502 * (-0.7981 + 2.3026) = 0.4063. ipo of averages:
    (1 / 2 + 1 / 4 - 5)^2 = 18.0625. simpo with b = 2 and m = 0.5: -0.5 and -1 a token, -log s(1 - 0.5) = 0.4741.

    >>> from .config import Config
    >>> p, ref, n = (Sides(*torch.tensor([[x], [y]])) for x, y in ((-1.0, -4.0), (-2.0, -3.0), (2.0, 4.0)))
    >>> def by_hand(**keys):
    ...     return round(pair_losses(p, ref, n, Config(**keys)).item(), 4)
    >>> by_hand(), by_hand(loss="ipo"), by_hand(loss="hinge")
    (0.5981, 9.0, 0.8)
    >>> by_hand(loss="robust", label_smoothing=0.1), by_hand(loss="exo_pair", label_smoothing=0.1)
    (0.5731, 0.4063)
    >>> by_hand(loss="ipo", ipo_length="average"), by_hand(loss="simpo", beta=2.0, margin=0.5)
    (18.0625, 0.4741)
    """
    b, e = config.beta, config.label_smoothing
    if config.loss == "simpo":
        ahead = policy.chosen / lengths.chosen - policy.rejected / lengths.rejected
        return -logsigmoid(b * ahead - (0.5 if config.margin is None else config.margin))
    h = policy.gap - reference.gap
    if config.loss == "ipo":
        if config.ipo_length == "average":
            chosen = (policy.chosen - reference.chosen) / lengths.chosen
            h = chosen - (policy.rejected - reference.rejected) / lengths.rejected
        return (h - 1 / (2 * b)).square()
    if config.loss == "hinge":
        return (1 - b * h).clamp(min=0)
    right: Tensor = logsigmoid(b * h)
    wrong: Tensor = logsigmoid(-b * h)
    if config.loss == "robust":
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e)
    if config.loss == "exo_pair":
        return right.exp() * (right - math.log(1 - e)) + wrong.exp() * (wrong - math.log(e))
    return -(1 - e) * right - e * wrong


def preference_loss(batch: Batch, output: Output, config: Config) -> Loss:
    """A sum over pairs, with its metrics: means over pairs.

    ``accuracy`` is the share whose chosen side is ahead, a tie being ``tie`` of it, as every pair is before the first
    step; a side's ``pair/..._reward`` is b (log p - log p_ref), and ``pair/margin`` how far the chosen one is ahead.
    """
    assert output.logprobs is not None
    policy = sides(batch, batch.by_seq(output.logprobs))
    lengths = Sides(*(x.clamp(min=1) for x in sides(batch, batch.lengths)))
    zero = torch.zeros_like(policy.chosen)
    reference = sides(batch, batch.by_seq(batch.columns["ref_logprobs"])) if config.referenced else Sides(zero, zero)
    losses = pair_losses(policy, reference, lengths, config)
    with torch.no_grad():
        rewards = Sides(*(config.beta * (p - r) for p, r in zip(policy, reference, strict=True)))
        if not config.referenced:  # what this loss compares
            rewards = Sides(*(config.beta * p / n for p, n in zip(policy, lengths, strict=True)))
        found = {
            "accuracy": torch.where(rewards.gap == 0, config.tie, (rewards.gap > 0).to(rewards.gap.dtype)),
            "pair/margin": rewards.gap,
            "pair/chosen_reward": rewards.chosen,
            "pair/rejected_reward": rewards.rejected,
            "pair/chosen_logprob": policy.chosen,
            "pair/rejected_logprob": policy.rejected,
        }
    return Loss(losses.sum(), "unit", {name: Mean(x.detach().sum(), "unit") for name, x in found.items()})


def chosen_nll(batch: Batch, output: Output, config: Config) -> Mean:
    """``-log p(c) / |c|``, a mean over pairs; or ``-log p`` of all their tokens, a mean over these.

    By hand, of a chosen side with log p = -1, -1 and one with -4: 2.5 over pairs, 2 over tokens.
    """
    assert output.logprobs is not None
    if config.sft_mean == "token":
        share = batch.counts["unit"] / batch.columns["chosen_tokens"]
        return Mean(-(output.logprobs * is_chosen(batch) * share).sum(), "unit")
    nll = sides(batch, -batch.by_seq(output.logprobs) / batch.lengths.clamp(min=1)).chosen
    return Mean(nll.sum(), "unit")


def is_chosen(batch: Batch) -> Tensor:
    """[T] bool: a trained token of a chosen side."""
    return batch.per_token(batch.score > 0.5) & batch.mask


def count_chosen(batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
    """A column for each micro-batch: the trained tokens of its update's chosen sides, on every token."""
    found = by_update(batches, [is_chosen(batch).sum() for batch in batches], total)
    for batch, n in zip(batches, found, strict=True):
        batch.columns["chosen_tokens"] = n.clamp(min=1).float().expand(len(batch.mask))
