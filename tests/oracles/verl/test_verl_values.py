"""Values, advantages from them, whitening and rewards token by token, against verl 0.9.1."""

from __future__ import annotations

import pytest
import torch
from cases import Case, agree, agree_with_gradients, build, cases, differ, examples, means, total
from hypothesis import given
from hypothesis import strategies as st
from miles_plugin_ppo import PPO
from miles_plugin_ppo.controller import adapted
from miles_plugin_ppo.gae import gae
from torch import Tensor
from verl_reference import algos, functional

decays = st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0))


def returns(case: Case, mask: Tensor, values: Tensor, rewards: Tensor, decays: tuple[float, float]) -> Tensor:
    """verl whitens its advantages, but not these: the advantages and the values they were made with."""
    return algos.compute_gae_advantage_return(rewards, values, mask, *decays)[1]


def packed_rewards(case: Case) -> Tensor:
    batch, _ = case.packed(advantage="token_advantage")
    return batch.columns["advantage"]


def ours(case: Case, decays: tuple[float, float], skip: bool = True) -> Tensor:
    """[B, L]"""
    batch, _ = case.packed()
    found = gae(batch.columns["values"], packed_rewards(case), batch.mask, batch.seq, *decays, skip)
    return case.repad(found)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "discount"])
@examples
@given(case=cases(gaps=False, most=40), decays=decays)
def test_advantages_without_gaps_are_verls_whatever_gaps_says(skip, case, decays):
    values, rewards = case.padded("values"), case.padded("token_advantage")
    theirs = (returns(case, case.mask, values, rewards, decays) - values) * case.mask
    agree(ours(case, decays, skip), theirs)


@examples
@given(case=cases(most=40), decays=decays)
def test_gaps_are_skipped_as_verl_skips_them(case, decays):
    values, rewards = case.padded("values"), case.padded("token_advantage") * case.mask
    agree(ours(case, decays), (returns(case, case.mask, values, rewards, decays) - values) * case.mask)


@examples
@given(case=cases(most=40), decays=decays)
def test_gaps_that_discount_are_verls_tokens_of_value_and_reward_0(case, decays):
    """Which is how OpenRLHF has them: here the reference is told that the policy wrote every token."""
    values, rewards = case.padded("values") * case.mask, case.padded("token_advantage") * case.mask
    theirs = (returns(case, torch.ones_like(case.mask), values, rewards, decays) - values) * case.mask
    agree(ours(case, decays, skip=False), theirs)


def test_a_gap_makes_the_two_differ():
    case = Case([[(1, [True, False, True])]], seed=0)
    differ(ours(case, (0.9, 0.9), skip=True), ours(case, (0.9, 0.9), skip=False))


# -- a step's advantages, from rewards to whitened ---------------------------------------------------------------------


def step(case: Case, ppo: PPO, cut: int = 0) -> tuple[Tensor, Tensor]:
    """[B, L] advantages and returns of a step of two micro-batches."""
    rows = range(len(case.masks))
    batches = [case.packed(which)[0] for which in (rows[:cut], rows[cut:])]
    for batch in batches:
        batch.columns |= ppo.miles_advantage(batch)
    ppo.miles_normalize(batches, lambda x: x)
    return tuple(case.repad(torch.cat([b.columns[name] for b in batches])) for name in ("advantage", "returns"))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@examples
@given(case=cases(), decays=decays, cut=st.integers(0, 8))
def test_a_step_makes_verls_advantages_and_returns_from_rewards_and_divergence(estimator, case, decays, cut):
    keys = {"kl": 0.2, "kl_estimator": estimator, "gamma": decays[0], "lam": decays[1]}
    scores = case.last * torch.tensor(case.rewards)[:, None]
    kl = algos.kl_penalty(case.padded("old"), case.padded("ref"), estimator)
    rewards, values = scores - 0.2 * kl * case.mask, case.padded("values")
    if estimator == "k1":
        agree(rewards, algos.compute_rewards(scores, case.padded("old"), case.padded("ref"), 0.2))
    theirs = algos.compute_gae_advantage_return(rewards, values, case.mask, *decays)
    for mine, their in zip(step(case, build(PPO, **keys), cut), theirs, strict=True):
        agree(mine, their * case.mask)


@pytest.mark.parametrize("variance", ["unbiased", "biased"])
@examples
@given(case=cases())
def test_whitening_is_over_n_minus_1_as_in_verl_or_over_n(variance, case):
    plain, _ = step(case, build(PPO, whiten=False))
    mean = functional.masked_mean(plain, case.mask)
    spread = functional.masked_var(plain, case.mask, unbiased=variance == "unbiased")
    if variance == "unbiased":
        theirs = functional.masked_whiten(plain, case.mask)
    else:
        theirs = (plain - mean) * (spread + 1e-8).rsqrt()
    agree(step(case, build(PPO, whiten_variance=variance))[0], theirs * case.mask)


def test_a_step_of_one_token_has_advantage_0_where_verl_raises():
    case = Case([[(1, [True])]], seed=0)
    assert step(case, build(PPO))[0].tolist() == [[0.0]]
    with pytest.raises(ValueError, match="At least one element|sum of the mask"):
        functional.masked_whiten(case.padded("values"), case.mask)


# -- the critic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "verls"), [(0.2, 0.2), (0.5, 0.5), (0.0, 1e9)], ids=str)
@pytest.mark.parametrize("coef", [0.5, 1.0])
@examples
@given(case=cases())
def test_the_value_loss_is_verls_and_with_a_coefficient_of_1_twice_that(clip, verls, coef, case):
    """0 turns the clip off, which verl has no word for."""
    ppo, (batch, output) = build(PPO, value_clip=clip, value_coef=coef), case.packed()
    padded = case.padded("new_values")
    theirs, share = algos.compute_value_loss(
        vpreds=padded,
        returns=case.padded("returns"),
        values=case.padded("values"),
        response_mask=case.mask,
        cliprange_value=verls,
    )
    ours = total(ppo, batch, output, "critic")
    agree_with_gradients(case, ours, output.values, theirs * coef / 0.5, padded)
    agree(means(ppo, batch, output, "critic")["clipped"], share)


# -- the weight of the divergence --------------------------------------------------------------------------------------


@examples
@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(1e-3, 1.0), st.integers(1, 5000), st.integers(1, 20_000))
def test_the_controller_is_verls(beta, found, target, samples, horizon):
    theirs = algos.AdaptiveKLController(beta, target, horizon)
    theirs.update(found, samples)
    agree(adapted(beta, found, target, samples, horizon), theirs.value)


@pytest.mark.parametrize("lengths", [(4, 4), (1, 8)], ids=["even", "ragged"])
def test_the_controller_sees_a_mean_over_tokens_and_verls_one_over_sequences(lengths):
    case = Case([[(1, [True] * n) for n in lengths]], seed=1)
    kl = algos.kl_penalty(case.padded("old"), case.padded("ref"), "k3")
    found = {"tokens": float(functional.masked_mean(kl, case.mask))}
    found["sequences"] = float(functional.masked_mean(kl, case.mask, axis=-1).mean())
    target = found["tokens"] / 1.1
    ppo = build(PPO, kl=0.5, kl_estimator="k3", kl_target=target, kl_horizon=10)
    step(case, ppo)
    theirs = {over: algos.AdaptiveKLController(0.5, target, 10) for over in found}
    for over, controller in theirs.items():
        controller.update(found[over], len(lengths))
    agree(ppo.beta, theirs["tokens"].value)
    (agree if lengths[0] == lengths[1] else differ)(ppo.beta, theirs["sequences"].value)
    verls = build(PPO, kl=0.5, kl_estimator="k3", kl_target=target, kl_horizon=10, kl_mean="sequence")
    step(case, verls)
    agree(verls.beta, theirs["sequences"].value)
