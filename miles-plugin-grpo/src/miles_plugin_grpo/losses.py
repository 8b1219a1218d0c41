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
    ratio = sequence_ratio(gap, batch) if config.loss == "gspo" else bounded(gap).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.loss == "cispo":
        terms = weighted(logprobs, clipped, advantage)
    else:
        terms = pessimistic(ratio, clipped, advantage, config.dual_clip)
    total = reduce(batch.weighed(terms), batch, config.aggregate, max_tokens)
    return Loss(total.sum, total.per, metrics(batch, output, config, ratio.detach(), bounded(gap.detach())))


def sequence_ratio(gap: Tensor, batch: Batch) -> Tensor:
    """[T], every token carrying its sequence's ``s = exp(mean of log r)``: GSPO (arXiv:2507.18071, eq. 7).

    The gradient goes through the mean, so with one advantage a sequence it is the paper's eq. 10.
    """
    return batch.per_token(bounded(batch.by_seq(gap) / batch.lengths.clamp(min=1)).exp())


def weighted(logprobs: Tensor, clipped: Tensor, advantage: Tensor) -> Tensor:
    """``-sg(clip(r)) A log p``: CISPO (arXiv:2506.13585, eqs. 4 and 5). No token loses its gradient to the clip."""
    return -clipped.detach() * advantage * logprobs


def penalties(batch: Batch, output: Output, config: Config, max_tokens: int) -> dict[str, Mean]:
    """The weighted terms beside the loss, summed like it: divergence from the reference, and minus the entropy."""
    terms = {}
    if config.kl:
        assert output.logprobs is not None
        kl = divergence(output.logprobs, batch.columns["ref_logprobs"], config.kl_estimator)
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
        found["kl/ref"] = mean(divergence(output.logprobs, batch.columns["ref_logprobs"], config.kl_estimator))
    if output.entropy is not None:
        found["entropy"] = mean(output.entropy)
    return found
