"""Losses of pairs, and of responses that the data holds, against TRL 1.16.0."""

from __future__ import annotations

import pytest
import torch
from cases import Case, agree, build, cases, differ, examples, means, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.types import Batch, Output
from miles_plugin_dpo import DPO
from miles_plugin_dpo.sft import SFT
from torch import Tensor
from trl_reference import contrast, preference_loss, sides

pairs = cases(size=2)
betas = st.floats(0.05, 2.0)


def packed(case: Case) -> tuple[Batch, Output]:
    batch, output = case.packed()
    batch.unit = torch.tensor(case.index)
    batch.score = torch.tensor([1.0, 0.0] * len(case.groups()))
    batch.counts = case.counts | {"unit": len(case.groups())}
    return batch, output


def leaf(case: Case) -> Tensor:
    return sides(case, case.rows["logprobs"]).requires_grad_()


def agree_with_gradients(case: Case, ours: Tensor, output: Output, theirs: Tensor, leaf: Tensor) -> None:
    agree(ours, theirs)
    (mine,), (their,) = torch.autograd.grad(ours, output.logprobs), torch.autograd.grad(theirs, leaf)
    rows = mine.split([len(mask) for mask in case.masks])
    mask = sides(case, case.masks)
    agree(sides(case, list(rows)) * mask, their * mask)


def ratios(case: Case, logprobs: Tensor) -> Tensor:
    """[2P], the log-ratio of each side to the reference."""
    return ((logprobs - sides(case, case.rows["ref"])) * sides(case, case.masks)).sum(1)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "exo_pair"])
@examples
@given(case=pairs, beta=betas, smoothing=st.floats(0.01, 0.45))
def test_a_loss_of_pairs_is_trls_with_its_gradient_and_metrics(loss, case, beta, smoothing):
    keys = {"beta": beta} | ({"label_smoothing": smoothing} if loss in ("robust", "exo_pair") else {})
    dpo, (batch, output), logprobs = build(DPO, loss=loss, **keys), packed(case), leaf(case)
    theirs, reported = preference_loss(case, logprobs, loss, **keys)
    agree_with_gradients(case, total(dpo, batch, output), output, theirs, logprobs)
    found = means(dpo, batch, output)
    names = {"pair/margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    names |= {f"pair/{side}_reward": f"rewards/{side}" for side in ("chosen", "rejected")}
    names |= {f"pair/{side}_logprob": f"logps/{side}" for side in ("chosen", "rejected")}
    for ours, name in names.items():
        agree(found[ours], reported[name])


@examples
@given(pairs, betas)
def test_ipo_of_averages_is_trls_with_its_gradient(case, beta):
    dpo, (batch, output), logprobs = build(DPO, loss="ipo", ipo_length="average", beta=beta), packed(case), leaf(case)
    theirs, _ = preference_loss(case, logprobs, "ipo", beta=beta)
    agree_with_gradients(case, total(dpo, batch, output), output, theirs, logprobs)


@examples
@given(pairs, betas)
def test_ipo_of_sums_is_equation_17_as_trls_cpo_trainer_has_it(case, beta):
    dpo, (batch, output), logprobs = build(DPO, loss="ipo", beta=beta), packed(case), leaf(case)
    theirs = contrast(*ratios(case, logprobs).chunk(2), "ipo", beta=beta).mean()
    agree_with_gradients(case, total(dpo, batch, output), output, theirs, logprobs)


@examples
@given(pairs, betas, st.floats(0.0, 0.45))
def test_label_smoothing_in_sigmoid_is_conservative_dpo_as_trls_cpo_trainer_has_it(case, beta, smoothing):
    keys = {"beta": beta, "label_smoothing": smoothing}
    dpo, (batch, output), logprobs = build(DPO, **keys), packed(case), leaf(case)
    theirs = contrast(*ratios(case, logprobs).chunk(2), "sigmoid", **keys).mean()
    agree_with_gradients(case, total(dpo, batch, output), output, theirs, logprobs)


@examples
@given(pairs, betas, st.floats(0.0, 2.0))
def test_simpo_is_trls_with_its_gradient(case, beta, margin):
    dpo, (batch, output), logprobs = build(DPO, loss="simpo", beta=beta, margin=margin), packed(case), leaf(case)
    mask = sides(case, case.masks)
    averages = (logprobs * mask).sum(1) / mask.sum(1)
    theirs = contrast(*averages.chunk(2), "simpo", beta=beta, simpo_gamma=margin).mean()
    agree_with_gradients(case, total(dpo, batch, output), output, theirs, logprobs)


PAIR = Case([[(1, [True] * 5), (1, [True] * 2)]], seed=2)


def test_label_smoothing_in_trls_dpo_trainer_has_no_effect_on_sigmoid():
    smoothed, plain = (preference_loss(PAIR, leaf(PAIR), "sigmoid", label_smoothing=e)[0] for e in (0.3, 0.0))
    agree(smoothed, plain)
    agree(total(build(DPO), *packed(PAIR)), plain)
    differ(total(build(DPO, label_smoothing=0.3, beta=1.0), *packed(PAIR)), total(build(DPO, beta=1.0), *packed(PAIR)))


def test_ipo_of_sums_and_of_averages_differ():
    differ(total(build(DPO, loss="ipo"), *packed(PAIR)), preference_loss(PAIR, leaf(PAIR), "ipo")[0])


def test_a_tie_is_half_an_accuracy_and_in_trl_none():
    case = Case([[(1, [True]), (1, [True])]], seed=0)
    case.rows["ref"] = case.rows["logprobs"]
    assert means(build(DPO), *packed(case))["accuracy"] == 0.5
    assert preference_loss(case, leaf(case), "sigmoid")[1]["rewards/accuracies"] == 0.0
    assert means(build(DPO, tie=0.0), *packed(case))["accuracy"] == 0.0


# -- responses that the data holds -------------------------------------------------------------------------------------


@examples
@given(pairs)
def test_sft_over_tokens_is_trls_with_its_gradient(case):
    chosen = range(0, len(case.masks), 2)
    batch, output = case.packed(list(chosen))
    batch.counts = case.counts | {"token": int(batch.mask.sum())}
    logprobs = leaf(case)
    theirs, _ = preference_loss(case, logprobs, "sft")
    ours = total(build(SFT), batch, output)
    agree(ours, theirs)
    (mine,), (their,) = torch.autograd.grad(ours, output.logprobs), torch.autograd.grad(theirs, logprobs)
    rows = mine.split([len(case.masks[i]) for i in chosen])
    for row, expected in zip(rows, their, strict=False):  # theirs has the rejected ones below
        agree(row, expected[: len(row)])


@examples
@given(pairs)
def test_the_chosen_sides_likelihood_over_tokens_is_trls_with_its_gradient(case):
    dpo, (batch, output), logprobs = build(DPO, sft=0.5, sft_mean="token"), packed(case), leaf(case)
    dpo.miles_normalize([batch], lambda x: x)
    (term,) = dpo.miles_penalty(role="policy", batch=batch, output=output).values()
    theirs, _ = preference_loss(case, logprobs, "sft")
    agree_with_gradients(case, term.sum / batch.counts[term.per], output, 0.5 * theirs, logprobs)


def test_the_chosen_sides_likelihood_is_a_mean_over_pairs_and_in_trl_over_tokens():
    even, ragged = (Case([[(1, [True] * n), (1, [True])] for n in lengths], seed=0) for lengths in ((3, 3), (1, 8)))
    for case, compare in ((even, agree), (ragged, differ)):
        ours = total(build(DPO, sft=0.5), *packed(case)) - total(build(DPO), *packed(case))
        compare(ours, 0.5 * preference_loss(case, leaf(case), "sft")[0])
