"""Every loss against its paper's formula on padded rows in double precision; by hand; and in single precision."""

import doctest
import math

import miles_plugin_dpo.losses as losses_module
import pytest
import torch
from dpo_cases import EXACT, Case, cases, examples, plugin, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.types import Refused
from miles_plugin_dpo.losses import Sides, pair_losses
from torch.nn.functional import binary_cross_entropy_with_logits

LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "margin": 0.7},
}
losses = pytest.mark.parametrize("loss", list(LOSSES))


def sigmoid(h, row, b, e):
    """DPO eq. 7 is the cross-entropy of the pair's label, which conservative DPO smoothes."""
    return binary_cross_entropy_with_logits(b * h, torch.full_like(h, 1 - e), reduction="none")


def ipo(h, row, b, e):
    """IPO eq. 17."""
    return (h - 0.5 / b) ** 2


def hinge(h, row, b, e):
    return torch.relu(1 - b * h)


def robust(h, row, b, e):
    """rDPO eq. 12, of the losses of the pair as labelled and the other way round."""
    as_labelled, swapped = (-torch.sigmoid(b * x).log() for x in (h, -h))
    return ((1 - e) * as_labelled - e * swapped) / (1 - 2 * e)


def exo_pair(h, row, b, e):
    """EXO eq. 16: the reverse divergence from the smoothed label."""
    p = torch.sigmoid(b * h)
    return p * (p / (1 - e)).log() + (1 - p) * ((1 - p) / e).log()


def simpo(h, row, b, e):
    """SimPO eq. 6."""
    chosen, rejected = row
    ahead = chosen.of(chosen.logprobs) / chosen.lengths - rejected.of(rejected.logprobs) / rejected.lengths
    return -torch.sigmoid(b * ahead - 0.7).log()


PAPERS = {f.__name__: f for f in (sigmoid, ipo, hinge, robust, exo_pair, simpo)}


def unpad(case, grads):
    return torch.cat([grads[j][i, : len(unit[j].mask)] for i, unit in enumerate(case.units) for j in range(2)])


@losses
@examples
@given(case=cases, beta=st.sampled_from([0.1, 1.0]))
def test_every_loss_is_its_paper_s(loss, case, beta):
    keys = {"beta": beta} | LOSSES[loss]
    batch, output = case.packed()
    found = total(plugin(loss=loss, **keys), batch, output)
    chosen, rejected = case.padded()
    h = chosen.of(chosen.logprobs - chosen.ref) - rejected.of(rejected.logprobs - rejected.ref)
    expected = PAPERS[loss](h, (chosen, rejected), keys["beta"], keys.get("label_smoothing", 0.0)).mean()
    torch.testing.assert_close(found, expected, **EXACT)
    found.backward()
    expected.backward()
    gradients = unpad(case, [chosen.logprobs.grad, rejected.logprobs.grad])
    torch.testing.assert_close(output.logprobs.grad, gradients, **EXACT)


@examples
@given(case=cases)
def test_ipo_by_the_length_of_a_side(case):
    chosen, rejected = case.padded()
    h = chosen.of(chosen.logprobs - chosen.ref) / chosen.lengths
    h = h - rejected.of(rejected.logprobs - rejected.ref) / rejected.lengths
    expected = ((h - 1 / 0.4) ** 2).mean()
    found = total(plugin(loss="ipo", beta=0.2, ipo_length="average"), *case.packed())
    torch.testing.assert_close(found, expected, **EXACT)


@examples
@given(case=cases, weight=st.sampled_from([0.3, 2.0]))
def test_sft_adds_the_chosen_side_s_mean_log_probability(case, weight):
    chosen, _ = case.padded()
    nll = (-chosen.of(chosen.logprobs) / chosen.lengths).mean()
    batch, output = case.packed()
    with_it, without = (total(plugin(sft=w), batch, output) for w in (weight, 0.0))
    torch.testing.assert_close(with_it - without, weight * nll.detach(), rtol=1e-9, atol=1e-9)
    term = plugin(sft=weight).miles_penalty(role="policy", batch=batch, output=output)
    assert term.keys() == {"penalty/sft"} and plugin().miles_penalty("policy", batch, output) == {}


def test_numbers_worked_out_by_hand_are_those_of_the_docstring():
    outcome = doctest.testmod(losses_module)
    assert outcome.attempted and not outcome.failed
    policy, lengths = (Sides(*torch.tensor([[x], [y]])) for x, y in ((-1.0, -4.0), (2.0, 4.0)))
    simpo = pair_losses(policy, policy, lengths, plugin(loss="simpo", beta=2.0).config)
    assert simpo.item() == pytest.approx(math.log1p(math.exp(-0.5)))  # the margin that is there by default


@pytest.mark.parametrize(("mean", "expected"), [("pair", 2.5), ("token", 2.0)])
def test_the_chosen_side_s_likelihood_worked_out_by_hand(mean, expected):
    """The case in the docstring of ``chosen_nll``; the pairs are two micro-batches of two ranks."""
    case = Case([([False, True, True], [False, True]), ([False, True], [False, True])], 0)
    rows = {"0/0": [0, -1, -1], "0/1": [0, -7], "1/0": [0, -4], "1/1": [0, -7]}
    case.said = {id: (torch.tensor(row).double(),) * 2 for id, row in rows.items()}
    dpo, found = plugin(sft=1.0, sft_mean=mean), 0.0
    parts = [case.packed([unit]) for unit in case.units]
    for batch, output in parts:
        rest = sum(len(unit[0].mask) - 1 for unit in case.units) - int((batch.score > 0.5)[batch.seq][batch.mask].sum())
        dpo.miles_normalize([batch], lambda mine, rest=rest: mine + rest)
        (term,) = dpo.miles_penalty("policy", batch, output).values()
        found += term.sum.item() / case.counts[term.per]
    assert found == pytest.approx(expected)


@losses
@examples
@given(case=cases, order=st.randoms(use_true_random=False))
def test_which_side_comes_first_makes_no_difference(loss, case, order):
    dpo = plugin(loss=loss, **LOSSES[loss])
    turned = [unit[::-1] if order.random() < 0.5 else unit for unit in case.units]
    one, other = (dpo.miles_loss("policy", *case.packed(units)) for units in (case.units, turned))
    torch.testing.assert_close(one.sum, other.sum, **EXACT)
    for name, mean in one.metrics.items():
        torch.testing.assert_close(mean.sum, other.metrics[name].sum, **EXACT)


def test_metrics_by_hand():
    case = Case([([False, True], [False, True]), ([False, True], [False, True]), ([False, True], [False, True])], 0)
    rows = {"0/0": (-1.0, -2.0), "0/1": (-3.0, -2.0), "1/0": (-2.0, -1.0), "1/1": (-2.0, -2.0)}
    rows |= {"2/0": (-1.0, -1.0), "2/1": (-1.5, -1.5)}  # a tie
    case.said = {id: tuple(torch.tensor([0.0, x]).double() for x in said) for id, said in rows.items()}
    loss = plugin(beta=0.5).miles_loss("policy", *case.packed())
    found = {name: mean.sum.item() / 3 for name, mean in loss.metrics.items()}
    assert loss.per == "unit" and {mean.per for mean in loss.metrics.values()} == {"unit"}
    assert found == pytest.approx({
        "accuracy": 1.5 / 3,
        "pair/margin": 0.5 * (2 - 1 + 0) / 3,
        "pair/chosen_reward": 0.5 * (1 - 1 + 0) / 3,
        "pair/rejected_reward": 0.5 * (-1 + 0 + 0) / 3,
        "pair/chosen_logprob": -4 / 3,
        "pair/rejected_logprob": -6.5 / 3,
    })  # fmt: skip


def test_a_tie_counts_what_the_key_says():
    case = Case([([False, True], [False, True])], 0)
    case.said = {id: (torch.tensor([0.0, -1.0]).double(),) * 2 for id in ("0/0", "0/1")}
    assert plugin(tie=0.0).miles_loss("policy", *case.packed()).metrics["accuracy"].sum.item() == 0.0


def test_without_a_reference_a_reward_is_what_the_loss_compares():
    case = Case([([False, True, True], [False, True])], 0)
    case.said = {"0/0": (torch.tensor([0, -1.0, -2.0]).double(),) * 2, "0/1": (torch.tensor([0, -2.0]).double(),) * 2}
    batch, output = case.packed()
    del batch.columns["ref_logprobs"]  # no role computes it
    found = plugin(loss="simpo", beta=2.0).miles_loss("policy", batch, output).metrics
    assert found["pair/chosen_reward"].sum.item() == pytest.approx(-3.0)
    assert found["pair/rejected_reward"].sum.item() == pytest.approx(-4.0)
    assert found["accuracy"].sum.item() == 1.0


@losses
def test_nothing_to_train_on_is_a_zero_with_a_gradient_of_zero(loss):
    batch, output = Case([], 0, dtype=torch.float32).packed()
    dpo = plugin(loss=loss, sft=0.5, **LOSSES[loss])
    found = total(dpo, batch, output)
    found.backward()
    assert found.item() == 0.0 and output.logprobs.grad is not None  # every rank must run backward
    assert all(mean.sum.item() == 0.0 for mean in dpo.miles_loss("policy", batch, output).metrics.values())


@losses
@pytest.mark.parametrize("distance", [-1000.0, -50.0, 50.0, 1000.0])
def test_a_policy_gone_astray_gives_finite_gradients(loss, distance):
    case = Case([([False, True, True], [False, True])] * 2, 3, dtype=torch.float32)
    for id, (policy, ref) in case.said.items():
        case.said[id] = policy, ref + distance * (1 if id.endswith("0") else -1) * (policy != 0)
    batch, output = case.packed()
    found = total(plugin(loss=loss, **LOSSES[loss] | {"beta": 1.0}), batch, output)
    found.backward()
    assert found.isfinite() and output.logprobs.grad.isfinite().all()


@losses
@examples
@given(case=cases)
def test_single_precision_agrees_with_double(loss, case):
    dpo = plugin(loss=loss, **LOSSES[loss])
    batch, output = case.packed()
    exact = total(dpo, batch, output).detach()
    batch.columns["ref_logprobs"] = batch.columns["ref_logprobs"].float()
    output.logprobs = output.logprobs.detach().float()
    torch.testing.assert_close(total(dpo, batch, output).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_the_policy_s_is_refused():
    batch, output = Case([([False, True], [False, True])], 0).packed()
    with pytest.raises(Refused, match="dpo trains the policy only, and was asked for the loss of 'critic'"):
        plugin().miles_loss("critic", batch, output)
    assert plugin(sft=1.0).miles_penalty("critic", batch, output) == {}
