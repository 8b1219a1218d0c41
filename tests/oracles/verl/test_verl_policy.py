"""Losses of the policy against verl 0.9.1: values, gradients, metrics, and what they are means over."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, agree, agree_with_gradients, build, cases, differ, examples, means, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.formulas.terms import LOG_RATIO_BOUND, divergence, reduce
from miles_plugin_grpo import GRPO
from miles_plugin_ppo import PPO
from verl_reference import AGGREGATES, aggregated, algos, policy_loss

aggregates = pytest.mark.parametrize("aggregate", AGGREGATES)
bounds = st.tuples(st.floats(0.05, 0.5), st.floats(0.05, 0.5))


@aggregates
@examples
@given(cases(), bounds)
def test_the_clipped_loss_is_verls_with_its_gradient_and_metrics(aggregate, case, clips):
    keys = {"clip_low": clips[0], "clip_high": clips[1]}
    grpo, (batch, output), padded = build(GRPO, aggregate=aggregate, **keys), case.packed(), case.padded("logprobs")
    theirs, reported = policy_loss(case, padded, aggregate, **keys)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)
    found = means(grpo, batch, output)
    agree(found["clip/low"] + found["clip/high"], reported["actor/pg_clipfrac"])


@pytest.mark.parametrize("dual_clip", [1.3, 3.0])
@aggregates
@examples
@given(case=cases())
def test_a_dual_clip_of_3_is_what_verl_does_when_nothing_is_said(aggregate, dual_clip, case):
    ppo = build(PPO, aggregate=aggregate, dual_clip=dual_clip)
    (batch, output), padded = case.packed(advantage="token_advantage"), case.padded("logprobs")
    given = {"advantage": case.padded("token_advantage")}
    theirs, reported = policy_loss(case, padded, aggregate, dual_clip=dual_clip, **given)
    agree_with_gradients(case, total(ppo, batch, output), output.logprobs, theirs, padded)
    agree(means(ppo, batch, output)["clip/dual"], reported["actor/pg_clipfrac_lower"])


def test_without_the_key_a_bad_token_far_off_has_no_bound_as_it_has_in_verl():
    case = Case([[(1, [True])], [(1, [True])]], seed=0)
    case.rows["old"] = [row - 2.0 * (row != 0) for row in case.rows["logprobs"]]  # r = exp(2), 7.4
    case.advantage = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    ours = total(build(GRPO, aggregate="token"), *case.packed())
    agree(ours, math.exp(2.0))
    agree(policy_loss(case, case.padded("logprobs"), "token", dual_clip=3.0)[0], 3.0)


@aggregates
@examples
@given(case=cases())
def test_gspo_is_verls_with_its_gradient(aggregate, case):
    grpo, (batch, output) = build(GRPO, variant="gspo", aggregate=aggregate, clip_high=0.1), case.packed()
    padded = case.padded("logprobs")
    theirs, reported = policy_loss(case, padded, aggregate, loss="gspo", clip_low=3e-4, clip_high=0.1)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)
    found = means(grpo, batch, output)
    agree(found["clip/low"] + found["clip/high"], reported["actor/pg_clipfrac"])


@aggregates
@examples
@given(case=cases())
def test_gspo_by_token_is_verls_where_tokens_have_advantages_of_their_own(aggregate, case):
    grpo = build(GRPO, variant="gspo", loss="gspo_token", aggregate=aggregate, clip_high=0.1)
    (batch, output), padded = case.packed(advantage="token_advantage"), case.padded("logprobs")
    keys = {"clip_low": 3e-4, "clip_high": 0.1, "advantage": case.padded("token_advantage")}
    theirs, _ = policy_loss(case, padded, aggregate, loss="gspo", **keys)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)


@aggregates
@examples
@given(cases(), bounds)
def test_cispo_is_verls_with_its_gradient_both_bounds_being_distances_from_1(aggregate, case, clips):
    keys = {"clip_low": clips[0], "clip_high": clips[1]}
    grpo, (batch, output) = build(GRPO, variant="cispo", aggregate=aggregate, **keys), case.packed()
    padded = case.padded("logprobs")
    theirs, reported = policy_loss(case, padded, aggregate, loss="cispo", **keys)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)
    found = means(grpo, batch, output)
    agree(found["clip/low"] + found["clip/high"], reported["actor/pg_clipfrac"])


@pytest.mark.parametrize("loss", ["clip", "cispo"])
@examples
@given(case=st.builds(Case, st.just([[(1, [True] * 6)] * 3]), st.integers(0, 2**31), st.just(20.0)))
def test_a_policy_that_is_lost_is_bounded_where_verl_bounds_it(loss, case):
    """Ratios up to exp(20), whose gradient is 0."""
    grpo, (batch, output), padded = build(GRPO, loss=loss), case.packed(), case.padded("logprobs")
    name = {"clip": "vanilla", "cispo": "cispo"}[loss]
    theirs, _ = policy_loss(case, padded, "sequence", loss=name)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)


# -- divergence and entropy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@aggregates
@examples
@given(case=cases())
def test_estimates_of_the_divergence_are_verls_as_a_penalty_too(aggregate, estimator, case):
    keys = {"aggregate": aggregate, "kl": 0.3, "kl_estimator": estimator}
    (batch, output), padded = case.packed(), case.padded("logprobs")
    found = algos.kl_penalty(padded, case.padded("ref"), estimator)
    agree(case.repad(divergence(output.logprobs, batch.columns["ref_logprobs"], estimator)) * case.mask, found)
    theirs = policy_loss(case, padded, aggregate)[0] + 0.3 * aggregated(found, case.mask, aggregate)
    agree_with_gradients(case, total(build(GRPO, **keys), batch, output), output.logprobs, theirs, padded)
    if estimator != "k1":  # refused there
        ppo = build(PPO, kl_in="loss", **keys)
        agree_with_gradients(case, total(ppo, batch, output), output.logprobs, theirs, padded)


def test_k3_far_from_the_reference_goes_on_where_verl_stops_at_10():
    near, far = torch.tensor([-1.0, -4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    agree(divergence(near, far, "k3"), [math.exp(1) - 2, math.exp(4) - 5])
    agree(algos.kl_penalty(near, far, "k3"), [math.exp(1) - 2, 10.0])


@aggregates
@examples
@given(case=st.builds(Case, st.just([[(1, [True] * 4)] * 3]), st.integers(0, 2**31), st.just(3.0)))
def test_k3_with_a_cap_of_10_is_verls_with_its_gradient(aggregate, case):
    keys = {"aggregate": aggregate, "kl": 0.3, "kl_estimator": "k3", "kl_cap": 10.0}
    (batch, output), padded = case.packed(), case.padded("logprobs")
    found = algos.kl_penalty(padded, case.padded("ref"), "k3")
    theirs = policy_loss(case, padded, aggregate)[0] + 0.3 * aggregated(found, case.mask, aggregate)
    for plugin in (build(GRPO, **keys), build(PPO, kl_in="loss", **keys)):
        agree_with_gradients(case, total(plugin, batch, output), output.logprobs, theirs, padded)


def test_k1_and_k2_stop_where_exponentials_would_overflow_and_verls_go_on():
    lost, ref = torch.tensor([50.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    agree(divergence(lost, ref, "k1"), [LOG_RATIO_BOUND])
    agree(algos.kl_penalty(lost, ref, "k1"), [50.0])


@aggregates
@examples
@given(case=cases())
def test_the_entropy_bonus_is_a_mean_over_what_the_loss_is_one_over_as_in_verl(aggregate, case):
    (batch, output), padded = case.packed(), case.padded("entropy")
    theirs = policy_loss(case, case.padded("logprobs"), aggregate)[0] - 0.1 * aggregated(padded, case.mask, aggregate)
    for plugin in (GRPO, PPO):
        ours = total(build(plugin, aggregate=aggregate, entropy=0.1), batch, output)
        agree_with_gradients(case, ours, output.entropy, theirs, padded)


# -- what a loss is a mean over ----------------------------------------------------------------------------------------


@aggregates
@examples
@given(case=cases(), cut=st.integers(0, 12))
def test_micro_batches_add_up_to_what_verl_says_of_all_of_them(aggregate, case, cut):
    rows = range(len(case.masks))
    of = [[i for i in rows if i < cut], [i for i in rows if i >= cut]]
    found = []
    for which in of:
        batch, _ = case.packed(which, advantage="token_advantage")
        mean = reduce(batch.columns["advantage"], batch, aggregate, 16)
        found.append(mean.sum / batch.counts[mean.per])
    x = case.padded("token_advantage")
    agree(sum(found), aggregated(x, case.mask, aggregate))
    sizes = {"dp_size": 2, "batch_num_tokens": int(case.mask.sum()), "global_batch_size": len(rows)}
    ranks = [aggregated(x[which], case.mask[which], aggregate, **sizes) for which in of]
    agree(sum(found), sum(ranks) / 2)  # its ranks' gradients are averaged


def test_a_sequence_with_nothing_to_train_on_counts_as_one_where_verl_is_told_how_many_there_are():
    case = Case([[(1, [True, True]), (1, [False, False])]], seed=0)
    batch, _ = case.packed(advantage="token_advantage")
    mean, x = reduce(batch.columns["advantage"], batch, "sequence", 16), case.padded("token_advantage")
    agree(mean.sum / batch.counts["sample"], aggregated(x, case.mask, "sequence", global_batch_size=2))
    differ(mean.sum / batch.counts["sample"], aggregated(x, case.mask, "sequence"))
