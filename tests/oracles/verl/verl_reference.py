"""How to ask verl for a number: what its functions want, from a case."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import MAX_TOKENS, Case
from torch import Tensor

WHY = "verl is not installed; `nox -s oracles` makes an environment that has it"
with warnings.catch_warnings():  # of its engines, none of which is installed
    warnings.simplefilter("ignore")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=WHY)
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason=WHY)
    functional = pytest.importorskip("verl.utils.torch_functional", reason=WHY)
    configs = pytest.importorskip("verl.workers.config", reason=WHY)
logging.disable(logging.WARNING)  # that there is no accelerator

AGGREGATES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
NO_DUAL_CLIP = 1e12  # beyond any ratio


def aggregated(x: Tensor, mask: Tensor, aggregate: str, **sizes: Any) -> Tensor:
    return algos.agg_loss(x, mask, AGGREGATES[aggregate], loss_scale_factor=MAX_TOKENS, **sizes)


def policy_loss(
    case: Case,
    logprobs: Tensor,
    aggregate: str,
    *,
    loss: str = "vanilla",
    advantage: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    sequences: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = NO_DUAL_CLIP,
) -> tuple[Tensor, dict[str, float]]:
    """One of its losses on the whole case, and the metrics that it reports."""
    config = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=clip_low,
        clip_ratio_high=clip_high,
        clip_ratio_c=dual_clip,
        global_batch_info={"loss_scale_factor": MAX_TOKENS, "global_batch_size": sequences},
    )
    return algos.get_policy_loss_fn(loss)(
        old_log_prob=case.padded("old"),
        log_prob=logprobs,
        advantages=case.advantage[:, None].expand_as(logprobs) if advantage is None else advantage,
        response_mask=case.mask if mask is None else mask,
        loss_agg_mode=AGGREGATES[aggregate],
        config=config,
        rollout_is_weights=weights,
    )


def advantages(case: Case, estimator: str, **more: Any) -> Tensor:
    """[B, L], zero off the mask, of rewards that each stand on the last token of an answer."""
    found, _ = algos.get_adv_estimator_fn(estimator)(
        token_level_rewards=case.last * torch.tensor(case.rewards, dtype=torch.float64)[:, None],
        response_mask=case.mask,
        index=np.array(case.index, dtype=object),
        config=None,
        **more,
    )
    return found * case.mask
