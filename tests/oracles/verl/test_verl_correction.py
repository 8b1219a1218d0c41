"""Importance weights between engine and trainer against verl 0.9.1, and what they do to a loss and its gradient."""

from __future__ import annotations

import pytest
import torch
from cases import Case, agree, agree_with_gradients, build, cases, differ, examples, total
from hypothesis import assume, given
from hypothesis import strategies as st
from miles_core.edges.correction import Correction
from miles_core.types import Batch
from miles_plugin_grpo import GRPO
from torch import Tensor
from verl_reference import AGGREGATES, helper, policy_loss

levels = pytest.mark.parametrize("level", ["token", "sequence"])
bounds = st.tuples(st.floats(0.2, 0.9), st.floats(1.1, 3.0))


def weigh(batch: Batch, **keys: object) -> Tensor:
    """[T]; the batch bears it from now on."""
    found = build(Correction, batch={"old_logprobs": "both"}, **keys).miles_token_weight(batch)
    batch.weight = found["correction"].factor
    return batch.weight


def gaps(case: Case) -> Tensor:
    return case.padded("old") - case.padded("rollout")


def weights(case: Case, level: str, threshold: float | str) -> Tensor:
    """[B, L]; a last sequence of ratio 1 goes in and is taken out, as a metric divides by the sum of all weights."""
    one = torch.ones_like(case.mask[:1])
    gap, mask = torch.cat([gaps(case), 0 * one]), torch.cat([case.mask, one])
    return helper.compute_rollout_correction_weights(gap, mask, level, threshold)[0][:-1]


@levels
@examples
@given(case=cases(), upper=st.floats(1.1, 3.0))
def test_truncated_weights_are_verls(level, case, upper):
    batch, _ = case.packed()
    agree(case.repad(weigh(batch, level=level, upper=upper)) * case.mask, weights(case, level, upper))


@levels
@examples
@given(case=cases(), bounds=bounds)
def test_masked_weights_are_what_verl_does_between_two_thresholds(level, case, bounds):
    batch, _ = case.packed()
    found = weigh(batch, level=level, outside="mask", lower=bounds[0], upper=bounds[1])
    agree(case.repad(found) * case.mask, weights(case, level, f"{bounds[0]}_{bounds[1]}"))


@pytest.mark.parametrize(
    ("level", "rule"), [("token", "token_k1"), ("sequence", "seq_sum_k1"), ("geometric", "seq_mean_k1")]
)
@examples
@given(case=cases(), bounds=bounds)
def test_a_mask_keeps_what_verls_rejection_keeps_its_bounds_being_of_the_inverse_ratio(level, rule, case, bounds):
    """Of a geometric mean verl knows the rejection only, not the weight."""
    batch, _ = case.packed()
    found = weigh(batch, level=level, outside="mask", lower=bounds[0], upper=bounds[1])
    inverse = f"{1 / bounds[1]}_{1 / bounds[0]}"
    kept, _ = helper.compute_rollout_rejection_mask(gaps(case), case.mask, rule, inverse)
    agree(case.repad(found > 0) * case.mask, kept)


@examples
@given(case=cases(), bounds=bounds)
def test_tokens_keep_weights_of_their_own_where_verls_rejection_keeps_their_sequence(case, bounds):
    """What NeMo-RL calls seq-mask-tis: here of verl's weights, which nothing truncates, and of its rejection."""
    batch, _ = case.packed()
    keys = {"outside": "mask", "gate": "geometric", "lower": bounds[0], "upper": bounds[1]}
    inverse = f"{1 / bounds[1]}_{1 / bounds[0]}"
    kept, _ = helper.compute_rollout_rejection_mask(gaps(case), case.mask, "seq_mean_k1", inverse)
    agree(case.repad(weigh(batch, **keys)) * case.mask, weights(case, "token", 1e9) * kept)


@pytest.mark.parametrize("denominator", ["token", "sequence"])
@examples
@given(case=cases(), bounds=bounds)
def test_a_mean_over_what_is_kept_is_verls_with_its_gradient_whose_rejection_shrinks_the_mask(
    denominator, case, bounds
):
    """Of both, a sequence of which nothing is kept counts as one: verl is told how many there are."""
    (batch, output), padded = case.packed(), case.padded("logprobs")
    keys = {"outside": "mask", "denominator": denominator, "lower": bounds[0], "upper": bounds[1]}
    correction = build(Correction, batch={"old_logprobs": "both"}, **keys)
    correction.miles_normalize([batch], lambda x: x)
    weigh(batch, **keys)
    inverse = f"{1 / bounds[1]}_{1 / bounds[0]}"
    kept, _ = helper.compute_rollout_rejection_mask(gaps(case), case.mask, "token_k1", inverse)
    given = {"weights": weights(case, "token", 1e9), "mask": kept, "sequences": len(case.masks)}
    theirs, _ = policy_loss(case, padded, denominator, **given)
    ours = total(build(GRPO, aggregate=denominator), batch, output)
    assume(kept.any())
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)


@pytest.mark.parametrize("loss", ["clip", "cispo"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@levels
@examples
@given(case=cases(), mask=st.booleans())
def test_a_weighed_loss_is_verls_with_its_gradient(level, aggregate, loss, case, mask):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    weigh(batch, level=level, upper=1.5, **({"outside": "mask", "lower": 0.6} if mask else {}))
    theirs, _ = policy_loss(
        case,
        padded,
        aggregate,
        loss={"clip": "vanilla", "cispo": "cispo"}[loss],
        weights=weights(case, level, "0.6_1.5" if mask else 1.5),
    )
    ours = total(build(GRPO, loss=loss, aggregate=aggregate), batch, output)
    agree_with_gradients(case, ours, output.logprobs, theirs, padded)


@examples
@given(case=cases())
def test_gspo_weighed_by_sequence_is_verls_with_its_gradient(case):
    (batch, output), padded = case.packed(), case.padded("logprobs")
    weigh(batch, level="sequence")
    theirs, _ = policy_loss(case, padded, "sequence", loss="gspo", weights=weights(case, "sequence", 2.0))
    agree_with_gradients(case, total(build(GRPO, loss="gspo"), batch, output), output.logprobs, theirs, padded)


FAR = Case([[(1, [True] * 6), (2, [True] * 3)]], seed=5, spread=0.8)


def test_gspo_weighed_by_token_is_verls_in_value_but_verl_keeps_the_weight_of_each_token_in_the_gradient():
    """Here, as in TRL, the gradient goes through the sequence's mean, where the weights are one sum."""
    (batch, output), padded = FAR.packed(), FAR.padded("logprobs")
    weigh(batch, level="token")
    given = {"weights": weights(FAR, "token", 2.0), "clip_low": 0.9, "clip_high": 5.0}
    theirs, _ = policy_loss(FAR, padded, "sequence", loss="gspo", **given)
    ours = total(build(GRPO, loss="gspo", clip_low=0.9, clip_high=5.0), batch, output)
    agree(ours, theirs)
    mine = torch.autograd.grad(ours, output.logprobs)[0]
    their = torch.autograd.grad(theirs, padded, retain_graph=True)[0]
    differ(FAR.repad(mine), their)
    agree(FAR.repad(mine).sum(1), their.sum(1))
    verls = total(build(GRPO, loss="gspo_token", clip_low=0.9, clip_high=5.0), batch, output)
    agree_with_gradients(FAR, verls, output.logprobs, theirs, padded)


def test_a_masked_token_stays_in_the_denominator_where_verls_rejection_takes_it_out():
    batch, output = FAR.packed()
    weigh(batch, outside="mask", lower=0.8, upper=1.25)
    ours, given = total(build(GRPO, aggregate="token"), batch, output), {"weights": weights(FAR, "token", "0.8_1.25")}
    agree(ours, policy_loss(FAR, FAR.padded("logprobs"), "token", **given)[0])
    kept, _ = helper.compute_rollout_rejection_mask(gaps(FAR), FAR.mask, "token_k1", "0.8_1.25")
    shrunken, _ = policy_loss(FAR, FAR.padded("logprobs"), "token", mask=kept, **given)
    assert 0 < kept.sum() < FAR.mask.sum()
    agree(ours * FAR.mask.sum(), shrunken * kept.sum())
