"""Rewards into advantages, and importance weights between engine and trainer, against TRL 1.16.0."""

from __future__ import annotations

import pytest
import torch
from cases import Case, agree, agree_with_gradients, build, cases, differ, examples, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.edges.correction import Correction
from miles_core.types import Batch
from miles_plugin_grpo import GRPO
from trl_reference import LOSSES, left_out, policy_loss, scored

sized = st.integers(2, 4).flatmap(lambda size: cases(size=size))  # its groups are all of one size


def ours(case: Case, **keys: object) -> torch.Tensor:
    """[B]"""
    scores = build(GRPO, **keys).miles_score(case.groups())
    return torch.tensor([score for group in scores for score in group], dtype=torch.float64)


@examples
@given(sized)
def test_grpo_with_an_epsilon_of_1e_4_is_trls(case):
    agree(ours(case, std_eps=1e-4), scored(case)["advantages"])


@examples
@given(sized)
def test_dr_grpo_is_trls_without_scaled_rewards(case):
    agree(ours(case, variant="dr_grpo"), scored(case, scale_rewards="none")["advantages"])


@examples
@given(sized)
def test_the_deviation_of_the_batch_is_trls(case):
    agree(ours(case, std="batch", std_eps=1e-4), scored(case, scale_rewards="batch")["advantages"])


@examples
@given(sized)
def test_rloo_is_trls(case):
    agree(ours(case, variant="rloo"), left_out(case))


ALONE = Case([[(1, [True, True])]], seed=0)
ALONE.rewards = [0.75]


def test_a_group_of_one_has_advantage_0_as_in_trl():
    agree(ours(ALONE), scored(ALONE)["advantages"])
    agree(ours(ALONE, variant="rloo"), left_out(ALONE))
    assert ours(ALONE).tolist() == [0.0]


def test_our_default_epsilon_is_not_trls():
    case = Case([[(1, [True]), (1, [True])]], seed=0)
    case.rewards = [0.0, 1 / 64]
    differ(ours(case), scored(case)["advantages"])


# -- off-policy correction ---------------------------------------------------------------------------------------------

BOUNDS = ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
modes = pytest.mark.parametrize("outside", ["truncate", "mask"])
levels = pytest.mark.parametrize("level", ["token", "sequence"])
bounds = st.tuples(st.floats(0.2, 0.9), st.floats(1.1, 3.0))


def weigh(batch: Batch, **keys: object) -> torch.Tensor:
    """[T]; the batch bears it from now on."""
    found = build(Correction, batch={"old_logprobs": "both"}, **keys).miles_token_weight(batch)
    batch.weight = found["correction"].factor
    return batch.weight


def weights(case: Case, level: str, outside: str, bounds: tuple[float | None, float]) -> torch.Tensor:
    """[B, L] or, of sequences, [B, 1]"""
    keys = {"use_vllm": True, "vllm_importance_sampling_mode": f"{level}_{outside}"}
    return scored(case, **keys | dict(zip(BOUNDS, bounds, strict=True)))["importance_sampling_ratio"]


@levels
@modes
@examples
@given(case=sized, bounds=bounds)
def test_weights_are_trls_within_and_beyond_both_bounds(outside, level, case, bounds):
    batch, _ = case.packed()
    found = case.repad(weigh(batch, level=level, outside=outside, lower=bounds[0], upper=bounds[1]))
    agree(found * case.mask, weights(case, level, outside, bounds) * case.mask)


@modes
@examples
@given(case=sized)
def test_a_lower_bound_of_0_is_trls_none(outside, case):
    batch, _ = case.packed()
    found = case.repad(weigh(batch, outside=outside, upper=1.5))
    agree(found * case.mask, weights(case, "token", outside, (None, 1.5)) * case.mask)


@pytest.mark.parametrize("loss", ["clip", "gspo"])
@pytest.mark.parametrize("aggregate", LOSSES)
@levels
@modes
@examples
@given(case=sized, bounds=bounds)
def test_a_weighed_loss_is_trls_with_its_gradient(outside, level, aggregate, loss, case, bounds):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    weigh(batch, level=level, outside=outside, lower=bounds[0], upper=bounds[1])
    theirs, _ = policy_loss(
        case,
        padded,
        weights=weights(case, level, outside, bounds),
        loss_type=LOSSES[aggregate],
        importance_sampling_level={"clip": "token", "gspo": "sequence"}[loss],
    )
    ours = total(build(GRPO, loss=loss, aggregate=aggregate), batch, output)
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)


@examples
@given(case=sized)
def test_the_divergence_is_not_weighed_as_in_trl(case):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    weigh(batch, upper=1.5)
    keys = {"beta": 0.3, "use_bias_correction_kl": False}
    theirs, _ = policy_loss(case, padded, weights=weights(case, "token", "truncate", (0.0, 1.5)), **keys)
    ours = total(build(GRPO, aggregate="token", kl=0.3), batch, output)
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)
