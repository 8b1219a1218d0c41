"""The losses of policy and critic against formulas written out from the papers, a sequence at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_core.types import Refused
from ppo_cases import EXACT, MAX_TOKENS, Case, cases, examples, means, plugin, total

bounds = st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 3.0))
aggregates = st.sampled_from(["token", "sequence", "constant"])
roles = pytest.mark.parametrize("role", ["policy", "critic"])
HARDEST = {"kl": 0.1, "kl_in": "loss", "kl_estimator": "k3", "entropy": 0.05, "dual_clip": 3.0}


def mean_of(rows, case, aggregate):
    """Of one tensor a sequence."""
    sums = [(x * mask).sum() for x, mask in zip(rows, case.masks, strict=True)]
    lengths = [max(int(mask.sum()), 1) for mask in case.masks]
    if aggregate == "token":
        return sum(sums) / case.counts["token"]
    if aggregate == "sequence":
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    return sum(sums) / MAX_TOKENS / len(sums)


def objective(case, logprobs, low, high, dual):
    """PPO eq. 7; with ``dual`` no less than dual * A where A < 0: arXiv:1912.09729, eq. 5."""
    for new, old, advantage in zip(logprobs, case.rows["old_logprobs"], case.rows["advantage"], strict=True):
        ratio = (new - old).exp()
        found = torch.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
        if dual is not None:
            found = torch.where(advantage < 0, torch.maximum(found, dual * advantage), found)
        yield found


@examples
@given(case=cases, bound=bounds, aggregate=aggregates, dual=st.sampled_from([None, 1.1, 3.0]))
def test_the_policy_s_loss_is_the_paper_s(case, bound, aggregate, dual):
    low, high = bound
    ppo = plugin(clip_low=low, clip_high=high, aggregate=aggregate, dual_clip=dual)
    batch, output = case.packed()
    loss = total(ppo, "policy", batch, output)
    mine = output.logprobs.detach().clone().requires_grad_()
    expected = -mean_of(objective(case, case.cut(mine), low, high, dual), case, aggregate)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(output.logprobs.grad, mine.grad, **EXACT)


@examples
@given(case=cases, clip=st.sampled_from([0.0, 0.05, 0.3]), coef=st.sampled_from([0.5, 1.0]))
def test_the_critic_s_loss_is_the_clipped_squared_error(case, clip, coef):
    batch, output = case.packed()
    loss = total(plugin(value_clip=clip, value_coef=coef), "critic", batch, output)
    mine, terms = output.values.detach().clone().requires_grad_(), []
    for i, value in enumerate(case.cut(mine)):
        old, returns = case.rows["values"][i], case.rows["returns"][i]
        worst = (value - returns) ** 2
        if clip:
            moved = torch.maximum(torch.minimum(value, old + clip), old - clip)
            worst = torch.maximum(worst, (moved - returns) ** 2)
        terms.append(coef * worst)
    expected = mean_of(terms, case, "token")
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(output.values.grad, mine.grad, **EXACT)


def test_the_value_loss_worked_out_by_hand():
    case = Case([[False, True]], seed=0)
    case.rows |= {name: [torch.tensor([7.0, x]).double()] for name, x in (("values", 1), ("returns", 3))}
    case.rows["new_values"] = [torch.tensor([7.0, 2.0]).double()]
    batch, output = case.packed()
    loss = plugin().miles_loss(role="critic", batch=batch, output=output)
    assert loss.sum.item() == pytest.approx(1.62) and loss.per == "token"
    assert means(loss.metrics, case.counts) == {"clipped": 1.0, "error": 4.0, "value/mean": 1.0, "return/mean": 3.0}


@examples
@given(case=cases, aggregate=aggregates, estimator=st.sampled_from(["k2", "k3"]))
def test_penalties_have_the_controller_s_weight_and_the_loss_s_mean(case, aggregate, estimator):
    ppo = plugin(kl=0.1, kl_in="loss", kl_estimator=estimator, entropy=0.05, aggregate=aggregate)
    ppo.beta = 0.3
    batch, output = case.packed()
    terms = ppo.miles_penalty(role="policy", batch=batch, output=output)
    found = means(terms, case.counts)
    log_r = [ref - new for ref, new in zip(case.rows["ref_logprobs"], case.rows["logprobs"], strict=True)]
    kl = [{"k2": x**2 / 2, "k3": x.exp() - 1 - x}[estimator] for x in log_r]
    assert found["penalty/kl"] == pytest.approx(0.3 * float(mean_of(kl, case, aggregate)), rel=1e-9, abs=1e-12)
    bonus = 0.05 * float(mean_of(case.rows["entropy"], case, aggregate))
    assert found["penalty/entropy"] == pytest.approx(-bonus, rel=1e-9, abs=1e-12)
    assert ppo.miles_penalty(role="critic", batch=batch, output=output) == {}


def test_a_divergence_in_the_rewards_is_not_in_the_loss_too():
    batch, output = Case([[False, True, True]], seed=0).packed()
    assert plugin(kl=0.1).miles_penalty(role="policy", batch=batch, output=output) == {}


@roles
@examples
@given(case=cases, data=st.data())
def test_any_split_into_micro_batches_has_the_same_gradient_loss_and_metrics(role, case, data):
    ppo = plugin(**HARDEST)
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(case.masks), max_size=len(case.masks)))
    order = data.draw(st.permutations(range(len(case.masks))))
    rows = [[i for i in order if places[i] == row] for row in range(4)]  # some of them empty
    starts = torch.tensor([0, *map(len, case.masks)]).cumsum(0)

    def step(rows):
        loss, metrics, gradient = 0.0, {}, torch.zeros(int(starts[-1]), dtype=torch.float64)
        for row in rows:
            batch, output = case.packed(row)
            part = total(ppo, role, batch, output)
            part.backward()
            loss += float(part.detach())
            where = torch.tensor([int(starts[i]) + t for i in row for t in range(len(case.masks[i]))], dtype=torch.long)
            gradient[where] += (output.values if role == "critic" else output.logprobs).grad
            found = means(ppo.miles_loss(role=role, batch=batch, output=output).metrics, case.counts)
            metrics = {name: metrics.get(name, 0.0) + value for name, value in found.items()}
        return loss, gradient, metrics

    (whole, gradient, metrics), (parts, summed, added) = step([range(len(case.masks))]), step(rows)
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(summed, gradient, **EXACT)
    assert added == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@roles
@pytest.mark.parametrize("masks", [[], [[False]], [[False, False, False], [False, False]]])
def test_nothing_to_train_on_is_a_zero_with_a_gradient_of_zero(role, masks):
    batch, output = Case(masks, seed=0, dtype=torch.float32).packed()
    loss = total(plugin(**HARDEST), role, batch, output)
    loss.backward()
    gradient = (output.values if role == "critic" else output.logprobs).grad
    assert loss.item() == 0.0 and gradient is not None and not gradient.any()  # every rank must run backward
    metrics = plugin(**HARDEST).miles_loss(role=role, batch=batch, output=output).metrics
    assert all(float(mean.sum) == 0.0 for mean in metrics.values())


@roles
@pytest.mark.parametrize("distance", [-1000.0, -100.0, 100.0, 1000.0])
def test_a_model_gone_astray_gives_finite_gradients(role, distance):
    case = Case([[False, True, True]] * 4, seed=3, dtype=torch.float32)
    for name in ("old_logprobs", "values"):
        case.rows[name] = [row + distance * mask for row, mask in zip(case.rows[name], case.masks, strict=True)]
    case.rows["ref_logprobs"] = [r - distance * m for r, m in zip(case.rows["ref_logprobs"], case.masks, strict=True)]
    batch, output = case.packed()
    loss = total(plugin(**HARDEST), role, batch, output)
    loss.backward()
    gradient = (output.values if role == "critic" else output.logprobs).grad
    assert loss.isfinite() and gradient.isfinite().all()


def test_metrics_count_what_the_clip_changed():
    case = Case([[False, *[True] * 8]] * 2, seed=0)
    good = [0.5, 0.6, 0.9, 1.1, 1.5, 1.1, 1.4, 4.0]
    bad = [0.5, 0.6, 0.7, 1.1, 1.5, 1.1, 3.5, 4.0]
    case.rows["advantage"] = [torch.full((9,), a, dtype=torch.float64) for a in (1.0, -2.0)]
    case.rows["old_logprobs"] = [torch.zeros(9, dtype=torch.float64)] * 2
    case.rows["logprobs"] = [torch.tensor([0.0, *map(math.log, x)], dtype=torch.float64) for x in (good, bad)]
    batch, output = case.packed()

    def found(**keys):
        return means(plugin(**keys).miles_loss(role="policy", batch=batch, output=output).metrics, case.counts)

    clip = found(dual_clip=3.0, kl=0.1)
    assert clip["clip/low"] == 3 / 16  # below 0.8 where A < 0: 0.5, 0.6 and 0.7
    assert clip["clip/high"] == 3 / 16  # above 1.2 where A > 0: 1.5, 1.4 and 4
    assert clip["clip/dual"] == 2 / 16  # above 3 where A < 0
    assert clip["advantage/abs"] == 1.5
    ratios = good + bad
    assert clip["ratio/mean"] == pytest.approx(sum(ratios) / 16)
    assert clip["kl/old"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 16)
    assert clip["entropy"] == pytest.approx(float((output.entropy.detach() * batch.mask).sum()) / 16)
    gap = (output.logprobs.detach() - batch.columns["ref_logprobs"]) * batch.mask
    assert clip["kl/ref"] == pytest.approx(float(gap.sum()) / 16)
    del batch.columns["ref_logprobs"]
    output.entropy = None
    assert {"clip/dual", "kl/ref", "entropy"}.isdisjoint(found())


def test_the_policy_s_terms_are_weighed_and_nothing_else_is():
    case = Case([[False, True, True], [False, True]], seed=4)
    batch, output = case.packed()
    plain = plugin().miles_loss(role="policy", batch=batch, output=output)
    batch.weight = torch.full_like(batch.columns["advantage"], 0.25)
    half = plugin().miles_loss(role="policy", batch=batch, output=output)
    torch.testing.assert_close(half.sum, plain.sum / 4)
    assert means(half.metrics, case.counts) == means(plain.metrics, case.counts)
    assert batch.weighed_by is batch.weight


def test_what_cannot_be_answered_is_refused():
    batch, output = Case([[False, True]], seed=0).packed()
    with pytest.raises(Refused, match="ppo trains a policy and a critic, and was asked for the loss of 'ref'"):
        plugin().miles_loss(role="ref", batch=batch, output=output)
    output.entropy = None
    with pytest.raises(Refused, match=r"ppo\.entropy"):
        plugin(entropy=0.1).miles_penalty(role="policy", batch=batch, output=output)
