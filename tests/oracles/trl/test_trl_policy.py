"""Losses of the policy against TRL 1.16.0: values, gradients, metrics, and what they are means over."""

from __future__ import annotations

import math

import pytest
import torch
from cases import MAX_TOKENS, Case, agree, agree_with_gradients, build, cases, differ, examples, means, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.formulas.terms import LOG_RATIO_BOUND
from miles_plugin_grpo import GRPO
from miles_plugin_ppo import PPO
from trl_reference import LOSSES, policy_loss, rloo, trainer

aggregates = pytest.mark.parametrize("aggregate", LOSSES)
bounds = st.tuples(st.floats(0.05, 0.5), st.floats(0.05, 0.5))


@aggregates
@examples
@given(cases(), bounds)
def test_the_clipped_loss_is_trls_with_its_gradient_and_metrics(aggregate, case, clips):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    clip = {"epsilon_low": clips[0], "epsilon_high": clips[1]}
    theirs, reported = policy_loss(case, padded, loss_type=LOSSES[aggregate], **clip)
    for plugin in (GRPO, PPO):
        algorithm = build(plugin, aggregate=aggregate, clip_low=clips[0], clip_high=clips[1])
        agree_with_gradients(case, total(algorithm, batch, output), output.logprobs, theirs, padded)
        found = means(algorithm, batch, output)
        for ours, name in {"clip/low": "low_mean", "clip/high": "high_mean"}.items():
            agree(found[ours], reported[f"clip_ratio/{name}"])
        agree(found["entropy"], reported["entropy"])


@examples
@given(cases())
def test_a_mean_over_tokens_is_trls_bnpo_too_where_there_is_one_micro_batch(case):
    batch, output = case.packed()
    theirs, _ = policy_loss(case, case.padded("logprobs"), loss_type="bnpo")
    agree(total(build(GRPO, aggregate="token"), batch, output), theirs)


def test_a_sequence_with_nothing_to_train_on_counts_as_one():
    case = Case([[(1, [True, True]), (1, [False, False])]], seed=0)
    theirs, _ = policy_loss(case, case.padded("logprobs"), loss_type="grpo")
    agree(total(build(GRPO, aggregate="sequence"), *case.packed()), theirs)


@pytest.mark.parametrize(("loss", "level"), [("clip", "token"), ("gspo", "sequence")])
@examples
@given(case=cases(), bound=st.floats(1.6, 3.0))
def test_a_dual_clip_above_the_clip_is_trls_delta(loss, level, case, bound):
    """TRL bounds the ratio, of good tokens too: no difference, as those are clipped below already."""
    (batch, output), padded = case.packed(), case.padded("logprobs")
    keys = {"loss_type": "grpo", "importance_sampling_level": level, "delta": bound}
    theirs, _ = policy_loss(case, padded, **keys)
    ours = total(build(GRPO, loss=loss, dual_clip=bound), batch, output)
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)


@aggregates
@examples
@given(cases(), bounds)
def test_gspo_is_trls_ratio_of_a_sequence_with_its_gradient(aggregate, case, clips):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    keys = {"epsilon_low": clips[0], "epsilon_high": clips[1], "importance_sampling_level": "sequence"}
    theirs, _ = policy_loss(case, padded, loss_type=LOSSES[aggregate], **keys)
    gspo = build(GRPO, variant="gspo", aggregate=aggregate, clip_low=clips[0], clip_high=clips[1])
    agree_with_gradients(case, total(gspo, batch, output), output.logprobs, theirs, padded)


@examples
@given(cases(), st.floats(0.05, 4.0))
def test_cispo_is_trls_with_its_gradient_whose_bound_is_the_ratio_itself(case, high):
    """Ours is a distance from 1, and there is one below, too: 1 turns that off, as it stands in the variant."""
    (batch, output), padded = case.packed(), case.padded("logprobs")
    theirs, _ = policy_loss(case, padded, loss_type="cispo", epsilon_high=1 + high)
    ours = total(build(GRPO, variant="cispo", clip_high=high), batch, output)
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)


FAR = Case([[(1, [True] * 6), (2, [True] * 3)]], seed=5, spread=0.8)


def test_cispo_bounded_below_is_none_of_trls():
    theirs, _ = policy_loss(FAR, FAR.padded("logprobs"), loss_type="cispo", epsilon_high=1.28)
    keys = {"variant": "cispo", "clip_high": 0.28}
    agree(total(build(GRPO, **keys), *FAR.packed()), theirs)
    differ(total(build(GRPO, clip_low=0.2, **keys), *FAR.packed()), theirs)


def test_a_policy_that_is_lost_is_bounded_and_in_trl_is_not():
    case = Case([[(1, [True]), (1, [True])]], seed=0)
    case.rows["old"] = [row - 30.0 * (row != 0) for row in case.rows["logprobs"]]
    case.advantage = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    agree(total(build(GRPO), *case.packed()), math.exp(LOG_RATIO_BOUND))
    agree(policy_loss(case, case.padded("logprobs"))[0], math.exp(30.0))


# -- divergence and entropy --------------------------------------------------------------------------------------------


@aggregates
@examples
@given(case=cases())
def test_k3_as_a_penalty_is_trls_without_its_correction(aggregate, case):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    keys = {"loss_type": LOSSES[aggregate], "beta": 0.3, "use_bias_correction_kl": False}
    theirs, reported = policy_loss(case, padded, **keys)
    grpo = build(GRPO, aggregate=aggregate, kl=0.3, kl_estimator="k3")
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)
    agree(means(grpo, batch, output)["kl/ref"], reported["kl"])


@aggregates
@examples
@given(case=cases())
def test_k3_as_trl_has_it_by_default_is_ours_multiplied_by_the_ratio(aggregate, case):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    keys = {"loss_type": LOSSES[aggregate], "beta": 0.3, "use_bias_correction_kl": True}
    theirs, reported = policy_loss(case, padded, **keys)
    grpo = build(GRPO, aggregate=aggregate, kl=0.3, kl_unbiased=True)
    agree_with_gradients(case, total(grpo, batch, output), output.logprobs, theirs, padded)
    agree(means(grpo, batch, output)["kl/ref"], reported["kl"])
    ppo = build(PPO, aggregate=aggregate, kl=0.3, kl_in="loss", kl_estimator="k3", kl_unbiased=True)
    agree_with_gradients(case, total(ppo, batch, output), output.logprobs, theirs, padded)


def test_without_the_key_k3_is_not_multiplied_by_the_ratio():
    _, reported = policy_loss(FAR, FAR.padded("logprobs"), beta=0.3, use_bias_correction_kl=True)
    for estimator in ("k1", "k2", "k3"):
        differ(means(build(GRPO, kl=0.3, kl_estimator=estimator), *FAR.packed())["kl/ref"], reported["kl"])


@examples
@given(cases())
def test_trls_entropy_bonus_is_ours_where_the_loss_is_a_mean_over_tokens(case):
    """TRL has it a mean over tokens whatever the loss is one over."""
    (batch, output), padded = case.packed(), case.padded("entropy")
    logprobs = case.padded("logprobs")
    theirs, _ = policy_loss(case, logprobs, entropy=padded, entropy_coef=0.1)
    ours = total(build(GRPO, aggregate="token", entropy=0.1), batch, output)
    agree_with_gradients(case, ours, output.entropy, theirs, padded)


def test_with_a_loss_over_sequences_the_entropy_bonus_is_not_trls():
    batch, output = FAR.packed()
    ours = total(build(GRPO, entropy=0.1), batch, output) - total(build(GRPO), batch, output)
    with_it, without = (
        policy_loss(FAR, FAR.padded("logprobs"), loss_type="grpo", **keys)[0] for keys in ({"entropy_coef": 0.1}, {})
    )
    differ(ours, with_it - without)


# -- leave one out -----------------------------------------------------------------------------------------------------


def rloo_loss(case: Case, padded: torch.Tensor) -> torch.Tensor:
    of = trainer(case)
    of._get_per_token_logps_and_entropies = lambda *args, **options: (padded, padded, None)
    none = torch.zeros(len(case.masks), 1, dtype=torch.long)
    inputs = {"prompt_ids": none, "prompt_mask": none, "completion_ids": case.mask.long(), "completion_mask": case.mask}
    inputs |= {"advantages": case.advantage, "old_logps": case.padded("old").sum(1)}
    return rloo.RLOOTrainer._compute_loss(of, None, inputs)


@examples
@given(cases(gaps=False))
def test_the_clipped_ratio_of_a_whole_sequence_is_trls_rloo_with_its_gradient(case):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    ours = total(build(GRPO, variant="rloo", loss="sequence", aggregate="sequence"), batch, output)
    agree_with_gradients(case, ours, output.logprobs, rloo_loss(case, padded), padded)


@examples
@given(cases(gaps=False))
def test_rloo_has_trls_gradient_at_a_steps_first_update_but_for_a_constant(case):
    """Then TRL's clips the ratio of a whole sequence, ours of each token: it is PPO's objective on RLOO's advantages.

    TRL sums a sequence's tokens, we divide the sum by the most tokens there can be; its tokens are all the policy's.
    """
    case.rows["old"] = case.rows["logprobs"]
    (batch, output), padded = case.packed(), case.padded("logprobs")
    theirs = rloo_loss(case, padded)
    ours = total(build(GRPO, variant="rloo"), batch, output)
    mine, their = torch.autograd.grad(ours, output.logprobs)[0], torch.autograd.grad(theirs, padded)[0]
    agree(case.repad(mine) * MAX_TOKENS, their)
