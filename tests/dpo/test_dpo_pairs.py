"""Which samples are a pair, by the data or by rewards, and that the loop's own packing never parts them."""

import pytest
import torch
from dpo_cases import EXACT, Case, attempts, cases, examples, plugin, total
from hypothesis import given
from hypothesis import strategies as st
from miles_core.packing import count, distribute, pack
from miles_core.types import Group, Sample
from miles_plugin_dpo.sft import SFT

rewards = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=9)


def given_pair(*rewards):
    return attempts(rewards or (0.0, 0.0), versions=(-1, -1))


def online(pairs=None, size=9):
    return plugin(tables={"batch": {"group_size": size}}, pairs=pairs)


def ids(units):
    return [[sample.id for sample in unit] for unit in units]


def test_the_data_s_first_response_is_the_chosen_one_whatever_it_is_rewarded():
    for group in (given_pair(), given_pair(0.0, 1.0)):
        assert ids(plugin().miles_units(group)) == [["0/0", "0/1"]]
        assert plugin().miles_score([group]) == [[1.0, 0.0]]


def test_attempts_are_paired_from_both_ends_of_their_rewards():
    group = attempts([0.2, 0.9, 0.0, 0.5, 0.7])
    assert ids(online().miles_units(group)) == [["0/1", "0/2"]]
    assert online().miles_score([group]) == [[None, 1.0, 0.0, None, None]]
    assert ids(online(pairs=2).miles_units(group)) == [["0/1", "0/2"], ["0/4", "0/0"]]
    assert online(pairs=2).miles_score([group]) == [[0.0, 1.0, 0.0, None, 1.0]]


def test_attempts_that_did_the_same_make_no_pair():
    group = attempts([1.0, 0.0, 1.0, 1.0])
    assert ids(online(pairs=2).miles_units(group)) == [["0/0", "0/1"]]  # the second best is no better than 1.0
    assert online(pairs=2).miles_score([group]) == [[1.0, 0.0, None, None]]


@examples
@given(rewards=rewards, pairs=st.integers(1, 4))
def test_every_sample_is_in_one_pair_at_most_and_the_better_one_is_chosen(rewards, pairs):
    group, dpo = attempts(rewards), online(pairs=min(pairs, len(rewards) // 2))
    units, (scores,) = dpo.miles_units(group), dpo.miles_score([group])
    used = [sample.id for unit in units for sample in unit]
    assert len(used) == len(set(used))
    assert all(good.reward > bad.reward for good, bad in units)
    of = {sample.id: score for sample, score in zip(group.samples, scores, strict=True)}
    assert [(of[good.id], of[bad.id]) for good, bad in units] == [(1.0, 0.0)] * len(units)
    assert all((score is not None) == (id in used) for id, score in of.items())
    assert bool(units) == (dpo.miles_drop_group(group) is None)


def test_a_group_without_a_pair_is_dropped_and_one_of_the_data_never():
    assert online().miles_drop_group(attempts([0.5, 0.5, 0.5])) == "every reward is 0.5"
    assert online().miles_drop_group(attempts([0.5, 0.6])) is None
    assert plugin().miles_drop_group(given_pair(1.0, 1.0)) is None


def test_an_attempt_that_wrote_nothing_does_not_make_a_group_the_data_s():
    group = attempts([0.0, 1.0])
    group.samples[0] = Sample(id="0/0", tokens=[0], mask=[False], versions=[-1], reward=0.0)
    assert ids(online().miles_units(group)) == [["0/1", "0/0"]]


@examples
@given(case=cases, ranks=st.integers(1, 4), budget=st.integers(1, 60))
def test_a_pair_is_never_split(case, ranks, budget):
    groups = [Group(i, list(unit)) for i, unit in enumerate(case.units)]
    units = [unit for group in groups for unit in plugin().miles_units(group)]
    batches = [
        pack(row, {}).to_batch(case.counts, 1.0, "cpu") for rank in distribute(units, ranks, budget) for row in rank
    ]
    assert sum(len(batch.score) for batch in batches) == 2 * len(groups)
    for batch in batches:
        for unit in batch.unit.unique():
            assert sorted(batch.score[batch.unit == unit].tolist()) == [0.0, 1.0]


def step(algorithm, case, ranks, budget):
    """Loss, gradient by sample and metrics of one update, dealt over ``ranks`` by the loop."""
    loss, metrics, gradients = 0.0, {}, {}
    for row in (row for rank in distribute(case.units, ranks, budget) for row in rank):
        batch, output = case.packed(row)
        part = total(algorithm, batch, output)
        part.backward()
        loss += part.item()
        samples = [sample for unit in row for sample in unit]
        grads = output.logprobs.grad.split([len(sample.tokens) for sample in samples]) if samples else ()
        gradients |= {sample.id: grad for sample, grad in zip(samples, grads, strict=True)}
        for name, mean in algorithm.miles_loss("policy", batch, output).metrics.items():
            metrics[name] = metrics.get(name, 0.0) + mean.sum.item() / batch.counts[mean.per]
    return loss, torch.cat([gradients[sample.id] for sample in case.samples]), metrics


ALGORITHMS = {"dpo": lambda: plugin(sft=0.3)}
for aggregate in ("token", "sequence", "constant"):
    ALGORITHMS[f"sft-{aggregate}"] = lambda how=aggregate: SFT(SFT.Config(aggregate=how), plugin().run)


@pytest.mark.parametrize("name", list(ALGORITHMS))
@examples
@given(case=cases, ranks=st.integers(1, 3), budget=st.integers(1, 60))
def test_any_deal_over_ranks_and_micro_batches_has_the_same_gradient_loss_and_metrics(name, case, ranks, budget):
    algorithm = ALGORITHMS[name]()
    case.counts = count(case.units)
    whole, dealt = step(algorithm, case, 1, 10_000), step(algorithm, case, ranks, budget)
    assert dealt[0] == pytest.approx(whole[0], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(dealt[1], whole[1], **EXACT)
    assert dealt[2] == pytest.approx(whole[2], rel=1e-9, abs=1e-12)


def test_denominators_are_the_update_s_pairs():
    assert Case([([False, True], [False, True])] * 5, 0).counts == {"token": 10, "sample": 10, "unit": 5}
