"""Losses and penalties against formulas written out from the papers, on padded rows in double precision."""

import math

import pytest
import torch
from grpo_cases import MAX_TOKENS, Case, cases, examples, plugin, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.formulas.terms import divergence, reduce
from miles_core.types import Refused
from miles_plugin_grpo.losses import ratios

bounds = st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 3.0))
aggregates = st.sampled_from(["token", "sequence", "constant"])
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def clip_objective(row, low, high, dual=None):
    """PPO eq. 7 and GRPO eq. 3; with ``dual`` the objective is no less than dual * A where A < 0."""
    ratio = (row.logprobs - row.old).exp()
    objective = torch.minimum(ratio * row.advantage, ratio.clip(1 - low, 1 + high) * row.advantage)
    if dual is not None:
        objective = torch.where(row.advantage < 0, torch.maximum(objective, dual * row.advantage), objective)
    return objective


def gspo_objective(row, low, high, dual=None):
    """GSPO eqs. 5 and 7: one ratio a sequence, the geometric mean of its tokens'."""
    length = row.mask.sum(1, keepdim=True).clip(min=1)
    s = (((row.logprobs - row.old) * row.mask).sum(1, keepdim=True) / length).exp()
    objective = torch.minimum(s * row.advantage, s.clip(1 - low, 1 + high) * row.advantage)
    if dual is not None:
        objective = torch.where(row.advantage < 0, torch.maximum(objective, dual * row.advantage), objective)
    return objective.expand_as(row.mask)


def cispo_objective(row, low, high, dual=None):
    """MiniMax-M1 eqs. 4 and 5."""
    with torch.no_grad():
        weight = (row.logprobs - row.old).exp().clip(1 - low, 1 + high)
    return weight * row.advantage * row.logprobs


def gspo_token_objective(row, low, high, dual=None):
    """GSPO eqs. 13 and 14: the same ratio, whose gradient each token has for itself."""
    length = row.mask.sum(1, keepdim=True).clip(min=1)
    s = (((row.logprobs - row.old) * row.mask).sum(1, keepdim=True) / length).exp().detach()
    s = s * row.logprobs.exp() / row.logprobs.exp().detach()
    return torch.minimum(s * row.advantage, s.clip(1 - low, 1 + high) * row.advantage)


def sequence_objective(row, low, high, dual=None):
    """PPO eq. 7 of whole answers, whose probability is the product of their tokens'."""
    ratio = ((row.logprobs - row.old) * row.mask).sum(1, keepdim=True).exp()
    return torch.minimum(ratio * row.advantage, ratio.clip(1 - low, 1 + high) * row.advantage).expand_as(row.mask)


OBJECTIVES = {"gspo_token": gspo_token_objective, "sequence": sequence_objective}
OBJECTIVES |= {"clip": clip_objective, "gspo": gspo_objective, "cispo": cispo_objective}


def kl_estimate(row, estimator):
    """Schulman 2020, with r = p_ref / p: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r."""
    log_r = row.ref - row.logprobs
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}[estimator]


def mean_of(x, row, aggregate):
    x = x * row.mask
    if aggregate == "token":
        return x.sum() / row.mask.sum().clip(min=1)
    if aggregate == "sequence":
        return (x.sum(1) / row.mask.sum(1).clip(min=1)).mean()
    return (x.sum(1) / MAX_TOKENS).mean()


def check(case, grpo, expected, row):
    batch, output = case.packed()
    loss = total(grpo, batch, output)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(output.logprobs.grad, case.unpad(row.logprobs.grad), **EXACT)
    if row.entropy.grad is not None:
        torch.testing.assert_close(output.entropy.grad, case.unpad(row.entropy.grad), **EXACT)


@pytest.mark.parametrize("loss", OBJECTIVES)
@examples
@given(case=cases, bound=bounds, aggregate=aggregates)
def test_every_loss_is_its_paper_s(loss, case, bound, aggregate):
    low, high = bound
    row = case.padded()
    expected = -mean_of(OBJECTIVES[loss](row, low, high), row, aggregate)
    check(case, plugin(loss=loss, clip_low=low, clip_high=high, aggregate=aggregate), expected, row)


@pytest.mark.parametrize("loss", ["clip", "gspo"])
@examples
@given(case=cases, dual=st.floats(1.01, 1.5), aggregate=aggregates)
def test_the_dual_clip_bounds_what_a_bad_sample_costs(loss, case, dual, aggregate):
    row = case.padded()
    expected = -mean_of(OBJECTIVES[loss](row, 0.2, 0.2, dual), row, aggregate)
    check(case, plugin(loss=loss, clip_low=0.2, clip_high=0.2, dual_clip=dual, aggregate=aggregate), expected, row)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@examples
@given(case=cases, kl=st.floats(0.001, 2.0), entropy=st.floats(0.001, 1.0), aggregate=aggregates)
def test_penalties_are_weighted_and_summed_like_the_loss(estimator, case, kl, entropy, aggregate):
    row = case.padded()
    penalty = kl * kl_estimate(row, estimator) - entropy * row.entropy
    expected = mean_of(penalty - clip_objective(row, 0.2, 0.2), row, aggregate)
    grpo = plugin(kl=kl, kl_estimator=estimator, entropy=entropy, aggregate=aggregate)
    check(case, grpo, expected, row)


def test_the_gradients_of_a_sequence_s_ratio_worked_out_by_hand():
    """The case in the docstring of ``ratios``: r = 4 and r = 1."""
    case = Case([[False, True, True]], seed=0)
    batch, _ = case.packed()
    for loss, expected in {
        "gspo": (2.0, [0, 1, 1]),
        "gspo_token": (2.0, [0, 2, 0]),
        "sequence": (4.0, [0, 4, 4]),
    }.items():
        gap = torch.tensor([0.0, math.log(4.0), 0.0], dtype=torch.float64, requires_grad=True)
        found = ratios(gap, batch, loss)
        assert found[1:].tolist() == pytest.approx([expected[0]] * 2)
        assert torch.autograd.grad(found[1], gap)[0].tolist() == pytest.approx(expected[1])


def test_what_a_loss_is_a_mean_over_worked_out_by_hand():
    """The case in the docstring of ``reduce``: 1, 1 on one sequence and 4 on another, 4 tokens at most."""
    batch, _ = Case([[False, True, True], [False, True]], seed=0).packed()
    x = torch.tensor([9.0, 1.0, 1.0, 9.0, 4.0], dtype=torch.float64)
    for aggregate, expected in {"token": 2.0, "sequence": 2.5, "constant": 0.75}.items():
        mean = reduce(x, batch, aggregate, max_tokens=4)
        assert mean.sum.item() / batch.counts[mean.per] == pytest.approx(expected)


@examples
@given(case=cases, aggregate=aggregates)
def test_a_divergence_is_capped_and_weighed_by_the_ratio_where_the_keys_say_so(case, aggregate):
    row = case.padded()
    kl = kl_estimate(row, "k3").clip(-0.1, 0.1) * (row.logprobs - row.old).exp()
    expected = mean_of(0.3 * kl - clip_objective(row, 0.2, 0.2), row, aggregate)
    grpo = plugin(kl=0.3, kl_cap=0.1, kl_unbiased=True, aggregate=aggregate)
    check(case, grpo, expected, row)
    found = grpo.miles_loss(role="policy", batch=case.packed()[0], output=case.packed()[1]).metrics["kl/ref"]
    assert float(found.sum.detach()) == pytest.approx(float((kl * row.mask).sum()), rel=1e-9, abs=1e-12)


def test_weighed_by_the_ratio_the_estimates_have_the_divergence_s_mean_and_gradient():
    """Exactly, by summing over a vocabulary, from which another policy than the one that learns has drawn."""
    logits, other, ref = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    old, ref_logprobs = other.log_softmax(0), ref.log_softmax(0)
    logprobs = logits.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        found = (old.exp() * divergence(logprobs, ref_logprobs, estimator, old=old)).sum()
        torch.testing.assert_close(found, exact, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(found, logits, retain_graph=True)[0], gradient, **EXACT)


def test_numbers_worked_out_by_hand():
    case = Case([[False, True, True], [False, False, True]], seed=0)
    case.scores = torch.tensor([1.0, -2.0], dtype=torch.float64)
    logs = [math.log(x) for x in (1.5, 0.9, 3.0)]  # the three ratios; the old log-probabilities are -1
    case.rows["old"] = [torch.tensor(r, dtype=torch.float64) for r in ([0, -1, -1], [0, 0, -1])]
    case.rows["logprobs"] = [
        torch.tensor(r, dtype=torch.float64) for r in ([0, logs[0] - 1, logs[1] - 1], [0, 0, logs[2] - 1])
    ]
    batch, output = case.packed()

    def value(**keys):
        loss = plugin(**keys).miles_loss(role="policy", batch=batch, output=output)
        return loss.sum.item(), loss.per

    # A = 1: min(1.5, 1.2) = 1.2 and 0.9. A = -2: min(-6, -2.4) = -6.
    assert value(variant="grpo") == (pytest.approx(-(1.2 + 0.9) / 2 + 6), "sample")
    assert value(variant="dr_grpo") == (pytest.approx((-1.2 - 0.9 + 6) / MAX_TOKENS), "sample")
    assert value(variant="dapo") == (pytest.approx(-1.28 - 0.9 + 6), "token")
    assert value(variant="dapo", dual_clip=2.5) == (pytest.approx(-1.28 - 0.9 + 5), "token")
    # s = sqrt(1.5 * 0.9) = 1.1619 is above 1.0004; the other is 3, and min(-6, -2.0008) = -6.
    assert value(variant="gspo") == (pytest.approx(-1.0004 + 6), "sample")
    cispo = -1.5 * (logs[0] - 1) - 0.9 * (logs[1] - 1) + 3 * 2 * (logs[2] - 1)
    assert value(variant="cispo") == (pytest.approx(cispo), "token")
    capped = -1.2 * (logs[0] - 1) - 0.9 * (logs[1] - 1) + 1.2 * 2 * (logs[2] - 1)
    assert value(variant="cispo", clip_high=0.2) == (pytest.approx(capped), "token")


@examples
@given(case=cases)
def test_the_first_update_is_the_plain_policy_gradient(case):
    """Nothing has moved, so every ratio is 1 and the gradient of each token is -A over the count."""
    case.rows["old"] = [row.clone() for row in case.rows["logprobs"]]
    for variant in ("dapo", "cispo"):
        batch, output = case.packed()
        total(plugin(variant=variant), batch, output).backward()
        expected = -batch.columns["advantage"] * batch.mask / case.counts["token"]
        torch.testing.assert_close(output.logprobs.grad, expected, **EXACT)


@examples
@given(case=cases)
def test_gspo_s_gradient_is_the_paper_s(case):
    """Eq. 10: s A / |y| on every token of a sequence that is not clipped."""
    batch, output = case.packed()
    total(plugin(variant="gspo", clip_low=1.0, clip_high=1e6), batch, output).backward()
    lengths = batch.lengths.clamp(min=1)
    s = (batch.by_seq(output.logprobs.detach() - batch.old_logprobs) / lengths).exp()
    expected = -(s * batch.score / lengths)[batch.seq] * batch.mask / case.counts["sample"]
    torch.testing.assert_close(output.logprobs.grad, expected, **EXACT)


def test_k2_has_the_gradient_of_the_divergence_and_k1_none():
    """Exactly, by summing over a vocabulary instead of sampling from it, under the policy's own probabilities."""
    logits, ref = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    ref_logprobs = ref.log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    logprobs = logits.log_softmax(0)
    exact = gradient((logprobs.exp() * (logprobs - ref_logprobs)).sum())
    by = {}
    for estimator in ("k1", "k2", "k3"):
        logprobs = logits.log_softmax(0)
        by[estimator] = gradient((logprobs.exp().detach() * divergence(logprobs, ref_logprobs, estimator)).sum())
    torch.testing.assert_close(by["k2"], exact, **EXACT)
    torch.testing.assert_close(by["k1"], torch.zeros_like(exact), **EXACT)
    assert (by["k3"] - exact).abs().max() > 0.01


def test_a_loss_that_is_not_the_policy_s_is_refused():
    batch, output = Case([[False, True]], seed=0).packed()
    with pytest.raises(Refused, match="loss of 'critic'"):
        plugin().miles_loss(role="critic", batch=batch, output=output)
    assert plugin(kl=0.1, entropy=0.1).miles_penalty(role="critic", batch=batch, output=output) == {}


def test_an_entropy_bonus_without_entropy_is_refused():
    batch, output = Case([[False, True]], seed=0).packed()
    output.entropy = None
    assert "entropy" not in plugin().miles_loss(role="policy", batch=batch, output=output).metrics
    with pytest.raises(Refused, match=r"grpo\.entropy"):
        plugin(entropy=0.1).miles_penalty(role="policy", batch=batch, output=output)


def test_metrics_count_what_the_clip_changed():
    case = Case([[False, *[True] * 8]] * 2, seed=0)
    good = torch.tensor([0.5, 0.6, 0.9, 1.1, 1.5, 1.2, 1.4, 4.0], dtype=torch.float64)
    bad = torch.tensor([0.5, 0.6, 0.7, 1.1, 1.5, 1.2, 3.5, 4.0], dtype=torch.float64)
    case.scores = torch.tensor([1.0, -2.0], dtype=torch.float64)
    case.rows["old"] = [torch.zeros(9, dtype=torch.float64)] * 2
    case.rows["logprobs"] = [torch.cat([torch.zeros(1, dtype=torch.float64), x.log()]) for x in (good, bad)]
    batch, output = case.packed()
    ratios = torch.cat([good, bad])

    def means(**keys):
        found = plugin(**keys).miles_loss(role="policy", batch=batch, output=output).metrics
        return {name: float(mean.sum) / case.counts[mean.per] for name, mean in found.items()}

    clip = means(variant="dapo", dual_clip=3.0)
    assert clip["clip/low"] == 3 / 16  # below 0.8 where A < 0: 0.5, 0.6 and 0.7
    assert clip["clip/high"] == 3 / 16  # above 1.28 where A > 0: 1.5, 1.4 and 4
    assert clip["clip/dual"] == 2 / 16  # above 3 where A < 0
    assert clip["ratio/mean"] == pytest.approx(float(ratios.mean()))
    assert clip["advantage/abs"] == 1.5
    assert clip["kl/old"] == pytest.approx(float((ratios - 1 - ratios.log()).mean()))
    assert clip["entropy"] == pytest.approx(float(output.entropy.detach().sum()) / 16)
    assert "kl/ref" not in clip and "clip/dual" not in means(variant="dapo")
    ref = means(variant="dapo", kl=0.5, kl_estimator="k1")["kl/ref"]
    assert ref == pytest.approx(float((output.logprobs - batch.columns["ref_logprobs"]).detach().sum()) / 16)
    cispo = means(variant="cispo", clip_low=0.2, clip_high=0.28)  # whatever the sign of A
    assert (cispo["clip/low"], cispo["clip/high"]) == (5 / 16, 6 / 16)
    gspo = means(variant="gspo")  # one ratio a sequence, both above 1
    assert (gspo["clip/low"], gspo["clip/high"]) == (0.0, 8 / 16)
