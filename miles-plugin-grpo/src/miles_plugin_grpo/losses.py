"""Advantages into gradients, on a training rank: one packed micro-batch at a time, nothing averaged here.

Below, r = p(token) / p_old(token) under the policy now and before the step's first update, A is the token's
advantage, and sg stops the gradient. Per-token tensors are [T] float32 and count on ``batch.mask`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from miles_core.formulas.terms import bounded, divergence, pessimistic, reduce
from miles_core.types import Loss, Mean, Refused
from torch import Tensor

if TYPE_CHECKING:
    from miles_core.types import Batch, Output

    from .config import Config


def policy_loss(batch: Batch, output: Output, config: Config, max_tokens: int) -> Loss:
    """The clipped objective of ``config.loss``, negated, summed as ``config.aggregate`` says, with its metrics.

    Consumes ``batch.columns["advantage"]`` [T], ``batch.old_logprobs`` [T] and ``output.logprobs`` [T].
    """
    logprobs, old = output.logprobs, batch.old_logprobs
    assert logprobs is not None and old is not None  # the loop's promise on the stage that computes losses
    advantage = batch.columns["advantage"]
    gap = logprobs - old
    ratio = ratios(gap, batch, config.loss)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.loss == "cispo":
        terms = weighted(logprobs, clipped, advantage)
    else:
        terms = pessimistic(ratio, clipped, advantage, config.dual_clip)
    total = reduce(batch.weighed(terms), batch, config.aggregate, max_tokens)
    return Loss(total.sum, total.per, metrics(batch, output, config, ratio.detach(), bounded(gap.detach())))


def ratios(gap: Tensor, batch: Batch, loss: str) -> Tensor:
    """[T], what ``loss`` clips, from ``gap`` = log r:

    - ``gspo``: every token carries its sequence's ``s = exp(mean of log r)`` (arXiv:2507.18071, eq. 7). The gradient
      goes through the mean, so with one advantage a sequence it is the paper's eq. 10
    - ``gspo_token``: the same numbers, but a token's gradient is ``s`` times its own, whatever its weight (eqs. 13, 14)
    - ``sequence``: ``exp(sum of log r)``, the ratio of the whole sequence; of it take a mean over sequences
    - else ``r``

    By hand, for two tokens with r = 4 and r = 1: s = 2 on both, and the whole sequence's ratio is 4. The gradient of
    the first one's s is s / 2 = 1 to each of both tokens' log p, and with ``gspo_token`` 2 and 0.
    """
    if loss == "sequence":
        return batch.per_token(bounded(batch.by_seq(gap)).exp())
    if loss not in ("gspo", "gspo_token"):
        return bounded(gap).exp()
    s = batch.per_token(bounded(batch.by_seq(gap) / batch.lengths.clamp(min=1)).exp())
    return s if loss == "gspo" else s.detach() * (gap - gap.detach()).exp()


def weighted(logprobs: Tensor, clipped: Tensor, advantage: Tensor) -> Tensor:
    """``-sg(clip(r)) A log p``: CISPO (arXiv:2506.13585, eqs. 4 and 5). No token loses its gradient to the clip.

    By hand, with a weight of 1.2, A = 2 and log p = -1: 2.4, with a gradient of -2.4.

    >>> logp = torch.tensor([-1.0], requires_grad=True)
    >>> loss = weighted(logp, torch.tensor([1.2]), torch.tensor([2.0]))
    >>> loss.sum().backward()
    >>> round(loss.item(), 4), round(logp.grad.item(), 4)
    (2.4, -2.4)
    """
    return -clipped.detach() * advantage * logprobs


def reference_divergence(batch: Batch, logprobs: Tensor, config: Config) -> Tensor:
    """[T], from the reference, as ``config`` estimates it."""
    old = batch.old_logprobs if config.kl_unbiased else None
    return divergence(logprobs, batch.columns["ref_logprobs"], config.kl_estimator, config.kl_cap, old)


def penalties(batch: Batch, output: Output, config: Config, max_tokens: int) -> dict[str, Mean]:
    """The weighted terms beside the loss, summed like it: divergence from the reference, and minus the entropy."""
    terms = {}
    if config.kl:
        assert output.logprobs is not None
        kl = reference_divergence(batch, output.logprobs, config)
        terms["penalty/kl"] = reduce(config.kl * kl, batch, config.aggregate, max_tokens)
    if config.entropy:
        if output.entropy is None:
            raise Refused(
                "grpo.entropy is set, but the plugin that answers miles_forward gives no entropy; set it to 0"
            )
        terms["penalty/entropy"] = reduce(-config.entropy * output.entropy, batch, config.aggregate, max_tokens)
    return terms


@torch.no_grad()
def metrics(batch: Batch, output: Output, config: Config, ratio: Tensor, gap: Tensor) -> dict[str, Mean]:
    """Means over trained tokens.

    ``clip/low`` and ``clip/high`` are the shares of tokens that the clip changed: those with no gradient, or with
    CISPO a bounded weight. ``ratio/mean`` is of what is clipped: for GSPO the sequence's. ``kl/old`` is k3 from the
    policy before the step's first update to the policy now.
    """
    mask, advantage = batch.mask, batch.columns["advantage"]

    def mean(x: Tensor) -> Mean:
        return Mean((x * mask).sum())

    low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    found = {
        "clip/low": mean(low if config.loss == "cispo" else low & (advantage < 0)),
        "clip/high": mean(high if config.loss == "cispo" else high & (advantage > 0)),
        "ratio/mean": mean(ratio),
        "kl/old": mean(torch.expm1(gap) - gap),
        "advantage/abs": mean(advantage.abs()),
    }
    if config.dual_clip is not None:
        found["clip/dual"] = mean((ratio > config.dual_clip) & (advantage < 0))
    if config.kl:
        assert output.logprobs is not None
        found["kl/ref"] = mean(reference_divergence(batch, output.logprobs, config))
    if output.entropy is not None:
        found["entropy"] = mean(output.entropy)
    return found
