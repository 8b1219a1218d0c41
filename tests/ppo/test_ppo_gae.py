"""Advantages against a loop over the tokens of one sequence, and what a token is rewarded with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_plugin_ppo.gae import gae
from miles_plugin_ppo.losses import token_rewards
from ppo_cases import EXACT, Case, cases, examples, plugin

fractions = st.sampled_from([0.0, 0.3, 0.95, 1.0])
gaps = pytest.mark.parametrize("gaps", ["skip", "discount"])


def by_a_loop(values, rewards, mask, gamma, lam, skip):
    """arXiv:1506.02438, eqs. 11 and 16, of one sequence from its end on."""
    found, following, carried = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        if mask[t]:
            delta = rewards[t] + gamma * following - values[t]
            found[t] = carried = delta + gamma * lam * carried
            following = values[t]
        elif not skip:  # a token with a value and a reward of 0, whose own advantage nobody asks for
            carried, following = gamma * following + gamma * lam * carried, 0.0
    return found


@gaps
@examples
@given(case=cases, gamma=fractions, lam=fractions)
def test_gae_is_the_loop_over_tokens(gaps, case, gamma, lam):
    batch, _ = case.packed()
    values, rewards = batch.columns["values"], batch.columns["returns"]  # any numbers will do
    skip = gaps == "skip"
    found = gae(values, rewards, batch.mask, batch.seq, gamma, lam, skip)
    parts = zip(case.cut(values), case.cut(rewards), case.masks, strict=True)
    expected = torch.cat([by_a_loop(v, r, m, gamma, lam, skip) for v, r, m in parts])
    torch.testing.assert_close(found, expected, **EXACT)


def test_hundreds_of_sequences_are_as_exact_as_one():
    """Sums run through all stretches before what lies beyond is taken off, which must cost no digits."""
    case = Case([[False, *[True] * 30]] * 400, seed=1)
    batch, _ = case.packed()
    values, rewards = batch.columns["values"] + 5.0, batch.columns["returns"]
    found = gae(values, rewards, batch.mask, batch.seq, 1.0, 0.97)
    first = by_a_loop(values[:31], rewards[:31], batch.mask[:31], 1.0, 0.97, True)
    torch.testing.assert_close(found[:31], first, **EXACT)


def test_the_case_worked_out_by_hand():
    values, rewards = torch.tensor([9.0, 0.5, 0.5, 0.5]), torch.tensor([9.0, 0.0, 0.0, 1.0])
    mask, seq = torch.tensor([False, True, True, True]), torch.zeros(4, dtype=torch.int64)
    assert gae(values, rewards, mask, seq, 1.0, 0.5).tolist() == [0.0, 0.125, 0.25, 0.5]


def test_rewards_of_tokens_worked_out_by_hand():
    """The case in the docstring of ``token_rewards``: k2 estimates of 2 and 3, weighed by 0.1, and a score of 1."""
    case = Case([[False, True, True]], seed=0)
    case.scores = torch.tensor([1.0], dtype=torch.float64)
    case.rows["old_logprobs"] = [torch.zeros(3, dtype=torch.float64)]
    case.rows["ref_logprobs"] = [torch.tensor([7.0, 2.0, 6.0**0.5], dtype=torch.float64)]
    rewards = token_rewards(case.packed()[0], plugin(kl=0.5, kl_estimator="k2").config, beta=0.1)
    assert rewards.tolist() == pytest.approx([0.0, -0.2, 0.7])


def test_a_tool_s_tokens_are_skipped_or_discount():
    """One answer token, two of a tool, one answer token that earns 1; values 0, gamma 1/2, lambda 1."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    mask, seq = torch.tensor([False, True, False, False, True]), torch.zeros(5, dtype=torch.int64)
    assert gae(torch.zeros(5), rewards, mask, seq, 0.5, 1.0, skip=True).tolist() == [0, 0.5, 0, 0, 1]
    assert gae(torch.zeros(5), rewards, mask, seq, 0.5, 1.0, skip=False).tolist() == [0, 0.125, 0, 0, 1]


@gaps
@pytest.mark.parametrize("masks", [[], [[False]], [[False, False], [False]]])
def test_nothing_to_train_on_has_no_advantage(gaps, masks):
    batch, _ = Case(masks, seed=0, dtype=torch.float32).packed()
    columns = plugin(gaps=gaps, kl=0.1).miles_advantage(batch)
    assert columns.keys() == {"advantage", "returns"}
    assert all(x.shape == batch.mask.shape and x.dtype == torch.float32 and not x.any() for x in columns.values())


@gaps
@examples
@given(case=cases, data=st.data())
def test_however_sequences_are_packed_each_has_its_own_advantage(gaps, case, data):
    ppo = plugin(gaps=gaps, gamma=0.9, kl=0.1)
    places = data.draw(st.lists(st.integers(0, 2), min_size=len(case.masks), max_size=len(case.masks)))
    order = data.draw(st.permutations(range(len(case.masks))))
    whole = {name: case.cut(x) for name, x in ppo.miles_advantage(case.packed()[0]).items()}
    for row in ([i for i in order if places[i] == place] for place in range(3)):
        found = ppo.miles_advantage(case.packed(row)[0])
        for name, x in found.items():
            expected = torch.cat([whole[name][i] for i in row]) if row else torch.empty(0, dtype=torch.float64)
            torch.testing.assert_close(x, expected, **EXACT)


@examples
@given(case=cases)
def test_returns_are_what_the_critic_has_to_predict(case):
    batch, _ = case.packed()
    found = plugin(lam=1.0).miles_advantage(batch)  # lambda 1: what is still to come, whatever the critic says
    expected = torch.cat([score * mask for score, mask in zip(case.scores, case.masks, strict=True)])
    torch.testing.assert_close(found["returns"], expected, **EXACT)


@examples
@given(case=cases, kl=st.sampled_from([0.0, 0.3]), kl_in=st.sampled_from(["reward", "loss"]))
def test_the_score_stands_on_the_last_trained_token_and_the_divergence_on_each(case, kl, kl_in):
    ppo = plugin(kl=kl, kl_in=kl_in, kl_estimator="k2")
    batch, _ = case.packed()
    found = case.cut(token_rewards(batch, ppo.config, beta=0.7))  # the controller's weight, not that of the table
    for i, (mask, score) in enumerate(zip(case.masks, case.scores, strict=True)):
        expected = torch.zeros(len(mask), dtype=torch.float64)
        if mask.any():
            expected[int(mask.nonzero().max())] = score
        if kl and kl_in == "reward":
            gap = case.rows["old_logprobs"][i] - case.rows["ref_logprobs"][i]
            expected -= 0.7 * gap**2 / 2 * mask
        torch.testing.assert_close(found[i], expected, **EXACT)
