"""Supervised fine-tuning: the mean that was asked for, of responses that the data holds, and nothing of the prompt."""

import pytest
import torch
from dpo_cases import EXACT, Case, cases, complaints, examples, run, total
from hypothesis import given
from miles_plugin_dpo.sft import SFT

aggregates = pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])


def sft(**keys):
    return SFT(SFT.Config.model_validate(keys), run(batch={"group_size": 1}))


@aggregates
@examples
@given(case=cases)
def test_the_loss_is_the_mean_negative_log_probability(aggregate, case):
    sides = case.padded()
    sums = torch.cat([-side.of(side.logprobs) for side in sides])
    lengths = torch.cat([side.mask.sum(1) for side in sides])
    mean = {"token": sums.sum() / lengths.sum(), "sequence": (sums / lengths).mean(), "constant": (sums / 16).mean()}
    batch, output = case.packed()
    found = total(sft(aggregate=aggregate), batch, output)
    torch.testing.assert_close(found, mean[aggregate].detach(), **EXACT)
    found.backward()
    assert not output.logprobs.grad[~batch.mask].any() and (output.logprobs.grad[batch.mask] < 0).all()


@aggregates
def test_by_hand(aggregate):
    """Two tokens of log-probability -1 and one of -4, in two responses; 16 is rollout.max_tokens."""
    case = Case([([False, True, True], [False, True])], 0)
    case.said = {"0/0": (torch.tensor([0, -1.0, -1.0]).double(),) * 2, "0/1": (torch.tensor([0, -4.0]).double(),) * 2}
    expected = {"token": 2.0, "sequence": 2.5, "constant": 6 / 32}[aggregate]
    assert total(sft(aggregate=aggregate), *case.packed()).item() == pytest.approx(expected)


@aggregates
def test_nothing_to_train_on_is_a_zero_with_a_gradient_of_zero(aggregate):
    batch, output = Case([], 0).packed()
    loss = total(sft(aggregate=aggregate), batch, output)
    loss.backward()
    assert loss.item() == 0.0 and output.logprobs.grad is not None


def test_entropy_is_reported_where_there_is_one():
    case = Case([([False, True], [False, True])], 0)
    batch, output = case.packed()
    output.entropy = torch.tensor([9.0, 0.5, 9.0, 1.5]).double()
    assert sft().miles_loss("policy", batch, output).metrics["entropy"].sum.item() == 2.0
    output.entropy = None  # as where a held-out loss is asked for
    assert sft().miles_loss("policy", batch, output).metrics == {}


def test_it_learns_from_responses_only():
    assert complaints(sft(), ["response"]) == []
    ((key, said),) = complaints(sft(), [])
    assert key == "data.responses" and "name their column" in said
