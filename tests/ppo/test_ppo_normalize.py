"""What a step does to all of its advantages at once, however its samples are dealt; and the controller of the KL."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_plugin_ppo.controller import adapted
from ppo_cases import Case, cases, examples, plugin


def dealt(ppo, case, shares):
    """The step's advantages once every rank has normalized its micro-batches, by sequence; and the plugins.

    ``shares`` are the sequences of each micro-batch of each rank. Ranks meet where ``total`` is called: their shares
    are added up there, as the data-parallel group does.
    """
    ranks = [[case.packed(row)[0] for row in rows] for rows in shares]
    said: list[torch.Tensor] = []  # what total returned so far, in order
    for _ in range(3):  # each pass gets one collective further; there are at most three
        plugins, sent = [ppo(), *(ppo() for _ in ranks[1:])], []
        copies = [[case.packed(row)[0] for row in rows] for rows in shares]
        for mine, batches in zip(plugins, copies, strict=True):
            calls: list[torch.Tensor] = []

            def total(tensor, calls=calls, said=said):
                calls.append(tensor)
                return said[len(calls) - 1] if len(calls) <= len(said) else tensor

            mine.miles_normalize(batches, total)
            sent.append(calls)
        said = [torch.stack(tensors).sum(0) for tensors in zip(*sent, strict=True)]
    found = {}
    for rows, batches in zip(shares, copies, strict=True):
        for row, batch in zip(rows, batches, strict=True):
            parts = batch.columns["advantage"].split([len(case.masks[i]) for i in row]) if row else ()
            found |= dict(zip(row, parts, strict=True))
    return [found[i] for i in range(len(case.masks))], plugins


@pytest.mark.parametrize("variance", ["unbiased", "biased"])
@examples
@given(case=cases, data=st.data())
def test_whitening_is_over_the_whole_step_however_it_is_dealt(variance, case, data):
    places = data.draw(st.lists(st.integers(0, 5), min_size=len(case.masks), max_size=len(case.masks)))
    rows = [[i for i, place in enumerate(places) if place == row] for row in range(6)]
    shares = [rows[:2], rows[2:4], rows[4:]]  # three ranks of two micro-batches, some of them empty
    found, _ = dealt(lambda: plugin(whiten_variance=variance, whiten_eps=1e-4), case, shares)
    masks, advantages = torch.cat(case.masks), torch.cat(case.rows["advantage"])
    x = advantages[masks]
    many = len(x) > (variance == "unbiased")
    spread = x.var(correction=int(variance == "unbiased")) if many else torch.zeros((), dtype=torch.float64)
    expected = torch.zeros_like(advantages)
    if len(x):
        expected[masks] = (x - x.mean()) / (spread + 1e-4).sqrt()
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)


def test_whitening_by_hand():
    """1, 2, 3: the variance is 1 over n - 1 and 2/3 over n."""
    for variance, edge in (("unbiased", 1.0), ("biased", 1.5**0.5)):
        case = Case([[False, True, True, True]], seed=0)
        case.rows["advantage"] = [torch.tensor([50.0, 1.0, 2.0, 3.0], dtype=torch.float64)]
        batch, _ = case.packed()
        plugin(whiten_variance=variance).miles_normalize([batch], lambda x: x)
        assert batch.columns["advantage"].tolist() == pytest.approx([0.0, -edge, 0.0, edge], abs=1e-7)


def test_a_small_variance_beside_a_large_mean_is_kept():
    case = Case([[False, *[True] * 100]], seed=0, dtype=torch.float32)
    case.rows["advantage"] = [1000.0 + torch.arange(101).float() / 1024]
    batch, _ = case.packed()
    plugin().miles_normalize([batch], lambda x: x)
    found = batch.columns["advantage"][batch.mask]
    assert found.dtype == torch.float32
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-5) and float(found.std()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("masks", [[], [[False]], [[False, True]]])
def test_a_step_of_nothing_or_one_token_stays_finite(masks):
    batch, _ = Case(masks, seed=0).packed()
    plugin(kl=0.1, kl_target=0.1).miles_normalize([batch], lambda x: x)
    assert batch.columns["advantage"].isfinite().all()


def test_without_whitening_nothing_is_changed_or_asked_for():
    batch, _ = Case([[False, True, True]], seed=0).packed()
    before = batch.columns["advantage"].clone()
    plugin(whiten=False, kl=0.1).miles_normalize([batch], total=None)
    assert torch.equal(batch.columns["advantage"], before)


def test_the_controller_by_hand():
    assert adapted(0.1, 0.03, target=0.02, samples=1000, horizon=10_000) == pytest.approx(0.102)
    assert adapted(0.1, 0.022, target=0.02, samples=1000, horizon=10_000) == pytest.approx(0.1 * 1.01)
    assert adapted(0.1, -5.0, target=0.02, samples=1000, horizon=10_000) == pytest.approx(0.098)  # clipped below too
    assert adapted(0.1, 0.02, target=0.02, samples=1000, horizon=10_000) == 0.1


@pytest.mark.parametrize("mean", ["token", "sequence"])
@examples
@given(case=cases, cut=st.integers(0, 7), kl_in=st.sampled_from(["reward", "loss"]))
def test_the_weight_is_steered_by_the_whole_step_on_every_rank_alike(mean, case, cut, kl_in):
    keys = {"kl": 0.1, "kl_target": 0.05, "kl_horizon": 100, "kl_in": kl_in, "kl_estimator": "k2", "kl_mean": mean}
    order = list(range(len(case.masks)))
    _, plugins = dealt(lambda: plugin(**keys), case, [[order[:cut], []], [order[cut:]]])
    pairs = zip(case.rows["old_logprobs"], case.rows["ref_logprobs"], case.masks, strict=True)
    sums = [(float(((old - ref) ** 2 / 2 * mask).sum()), max(int(mask.sum()), 1)) for old, ref, mask in pairs]
    divergence = sum(x for x, _ in sums) / case.counts["token"]
    if mean == "sequence":
        divergence = sum(x / n for x, n in sums) / len(sums)
    expected = adapted(0.1, divergence, 0.05, len(case.masks), 100)
    assert [ppo.beta for ppo in plugins] == [pytest.approx(expected, rel=1e-9)] * 2


def test_what_was_steered_outlives_the_process():
    keys = {"kl": 0.1, "kl_target": 0.05}
    before = plugin(**keys)
    before.miles_normalize([Case([[False, True, True]] * 3, seed=0).packed()[0]], lambda x: x)
    assert before.beta != 0.1
    after = plugin(**keys)
    after.miles_restore(json.loads(json.dumps(before.miles_state())))
    assert after.beta == before.beta
    untold = plugin(**keys)
    untold.miles_restore({})  # of another plugin, or of a run that had no target
    assert untold.beta == 0.1


def test_the_weight_is_reported_where_it_is_steered():
    batch, output = Case([[False, True, True]] * 3, seed=0).packed()
    steered = plugin(kl=0.1, kl_target=0.05)
    steered.miles_normalize([batch], lambda x: x)
    metrics = steered.miles_loss(role="policy", batch=batch, output=output).metrics
    assert float(metrics["kl/weight"].sum) / batch.counts["token"] == pytest.approx(steered.beta) != 0.1
    assert "kl/weight" not in plugin(kl=0.1).miles_loss(role="policy", batch=batch, output=output).metrics


def test_a_weight_that_nothing_steers_is_the_table_s():
    ppo = plugin(kl=0.1)
    ppo.miles_normalize([Case([[False, True, True]] * 3, seed=0).packed()[0]], lambda x: x)
    assert ppo.beta == 0.1 and ppo.miles_state() == {}
