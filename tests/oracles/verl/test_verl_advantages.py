"""Rewards into advantages against verl 0.9.1."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, agree, build, cases, differ, examples
from hypothesis import given
from hypothesis import strategies as st
from miles_plugin_grpo import GRPO
from verl_reference import advantages, functional


def ours(case: Case, **keys: object) -> torch.Tensor:
    """[B]"""
    scores = build(GRPO, **keys).miles_score(case.groups())
    return torch.tensor([score for group in scores for score in group], dtype=torch.float64)


def agree_on_tokens(case: Case, scores: torch.Tensor, theirs: torch.Tensor) -> None:
    agree(scores[:, None] * case.mask, theirs)


@examples
@given(cases())
def test_grpo_divides_by_the_unbiased_deviation_and_verls_epsilon(case):
    agree_on_tokens(case, ours(case), advantages(case, "grpo"))


@examples
@given(cases())
def test_grpo_is_what_verl_computes_at_once_for_all_groups(case):
    """In float32: rewards here are exact in it, deviations are not."""
    agree_on_tokens(case, ours(case), advantages(case, "grpo_vectorized"))


@examples
@given(cases())
def test_dr_grpo_is_verls_grpo_without_the_deviation(case):
    theirs = advantages(case, "grpo", norm_adv_by_std_in_grpo=False)
    agree_on_tokens(case, ours(case, variant="dr_grpo"), theirs)


@pytest.mark.parametrize("estimator", ["rloo", "rloo_vectorized"])
@examples
@given(case=cases())
def test_rloo_is_verls_in_both_of_its_forms(estimator, case):
    agree_on_tokens(case, ours(case, variant="rloo"), advantages(case, estimator))


@examples
@given(cases())
def test_the_reinforce_pp_baseline_is_whitened_over_tokens_as_in_verl(case):
    """verl adds 1e-8 to the variance, we add an epsilon to the deviation: here the one that comes to the same."""
    centered = advantages(case, "grpo", norm_adv_by_std_in_grpo=False)
    variance = float(functional.masked_var(centered, case.mask))
    eps = math.sqrt(variance + 1e-8) - math.sqrt(variance)
    found = ours(case, variant="reinforce_pp_baseline", std_eps=eps)
    agree_on_tokens(case, found, advantages(case, "reinforce_plus_plus_baseline"))


ALONE = Case([[(1, [True, True])]], seed=0)
ALONE.rewards = [0.75]
GROUPS = {"grpo": "grpo", "dr_grpo": "grpo", "rloo": "rloo"}


@pytest.mark.parametrize("variant", GROUPS)
def test_a_group_of_one_has_advantage_0_and_in_verl_its_reward(variant):
    assert ours(ALONE, variant=variant).tolist() == [0.0]
    agree_on_tokens(ALONE, torch.tensor(ALONE.rewards, dtype=torch.float64), advantages(ALONE, GROUPS[variant]))


@pytest.mark.parametrize("variant", GROUPS)
@examples
@given(case=st.builds(Case, st.lists(st.just([(1, [True, True])]), min_size=2, max_size=4), st.integers(0, 2**31)))
def test_a_group_of_one_has_its_reward_where_the_key_says_so_as_in_verl(variant, case):
    agree_on_tokens(case, ours(case, variant=variant, alone="reward"), advantages(case, GROUPS[variant]))


def test_a_group_of_one_has_advantage_0_in_verls_other_form_of_rloo_too():
    agree_on_tokens(ALONE, ours(ALONE, variant="rloo"), advantages(ALONE, "rloo_vectorized"))


def test_another_epsilon_is_another_advantage():
    case = Case([[(1, [True]), (1, [True])]], seed=0)
    case.rewards = [0.0, 1 / 4096]
    agree_on_tokens(case, ours(case), advantages(case, "grpo"))
    differ(ours(case, std_eps=1e-4), ours(case))
