"""Off-policy weights by hand, at every level, and what they leave alone."""

import math

import pytest
import torch
from miles_core.config import RunConfig
from miles_core.edges.correction import Correction
from miles_core.types import Batch, Column
from pydantic import ValidationError

BOTH = {"old_logprobs": "both"}


def plugin(batch=BOTH, **keys):
    return Correction(Correction.Config(**keys), RunConfig(algorithm="a", model={"path": "m"}, batch=batch))


def gaps(*rows):
    """A batch of sequences with these log p - log q; the first token of each is the prompt, None a tool's."""
    lengths = torch.tensor([1 + len(row) for row in rows], dtype=torch.int64)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seq = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    mask = torch.tensor([x is not None for row in rows for x in (None, *row)], dtype=torch.bool)
    gap = torch.tensor([x or 0.0 for row in rows for x in (0.0, *row)])
    draw = torch.Generator().manual_seed(0)
    engine = -torch.rand(len(seq), generator=draw) * mask
    none, tokens = torch.zeros(len(rows)), torch.zeros(len(seq), dtype=torch.int64)
    return Batch(
        tokens=tokens, mask=mask, starts=starts.int(), seq=seq, positions=torch.arange(len(seq)) - starts[seq],
        rollout_logprobs=engine, old_logprobs=engine + gap, score=none, reward=none, unit=torch.arange(len(rows)),
        temperature=1.0, counts={"token": int(mask.sum()), "sample": len(rows), "unit": len(rows)},
    )  # fmt: skip


def factors(batch, **keys):
    """The weights of trained tokens, and the means of the metrics."""
    weight = plugin(**keys).miles_token_weight(batch)["correction"]
    assert weight.factor.shape == batch.mask.shape and not weight.factor.requires_grad
    means = {name: mean.sum.item() / batch.counts[mean.per] for name, mean in weight.metrics.items()}
    return weight.factor[batch.mask].tolist(), means


E = math.exp


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [E(0.5), 2.0]),
        ({"outside": "mask"}, [E(0.5), 0.0]),
        ({"level": "sequence"}, [2.0, 2.0]),
        ({"level": "sequence", "upper": 5.0}, [E(1.5), E(1.5)]),
        ({"level": "sequence", "outside": "mask"}, [0.0, 0.0]),
        ({"level": "geometric", "upper": 5.0}, [E(0.75), E(0.75)]),
        ({"lower": 1.8, "upper": 5.0}, [1.8, E(1.0)]),
        ({"lower": 1.8, "upper": 5.0, "outside": "mask"}, [0.0, E(1.0)]),
        ({"outside": "mask", "denominator": "sequence"}, [2 * E(0.5), 0.0]),
        ({"outside": "mask", "gate": "geometric"}, [0.0, 0.0]),
        ({"outside": "mask", "gate": "geometric", "upper": 2.2}, [E(0.5), E(1.0)]),
        ({"outside": "mask", "gate": "token", "level": "sequence", "upper": 2.2}, [E(1.5), 0.0]),
    ],
    ids=str,
)
def test_the_case_worked_out_by_hand(keys, expected):
    """log p - log q = (0.5, 1), upper = 2 unless the keys say otherwise."""
    assert factors(gaps([0.5, 1.0]), **keys)[0] == pytest.approx(expected, rel=1e-5)


def test_a_sequence_s_weight_is_of_its_own_trained_tokens():
    batch = gaps([0.1, None, 0.3], [-0.2])
    assert factors(batch, level="sequence")[0] == pytest.approx([E(0.4)] * 2 + [E(-0.2)], rel=1e-5)
    assert factors(batch, level="geometric")[0] == pytest.approx([E(0.2)] * 2 + [E(-0.2)], rel=1e-5)


def test_metrics_by_hand():
    _, means = factors(gaps([0.5, 1.0], [0.0]), outside="mask")
    assert means["correction/weight"] == pytest.approx((E(0.5) + 0 + 1) / 3, rel=1e-5)
    assert means["correction/outside"] == pytest.approx(1 / 3)
    assert means["correction/kl"] == pytest.approx((E(0.5) - 1.5 + E(1) - 2) / 3, rel=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("far", [-1000.0, 1000.0])
def test_policies_far_apart_give_finite_weights(level, far):
    found, means = factors(gaps([far, far], [0.0]), level=level, upper=3.0)
    assert found == pytest.approx([3.0 if far > 0 else 0.0] * 2 + [1.0], abs=1e-6)
    assert all(map(math.isfinite, means.values()))


def test_nothing_to_weigh_is_nothing():
    weight = plugin().miles_token_weight(gaps())["correction"]
    assert weight.factor.shape == (0,) and all(mean.sum.item() == 0.0 for mean in weight.metrics.values())


def test_denominators_stay_what_they_are():
    """A masked token counts as one that says nothing."""
    batch = gaps([0.5, 1.0], [0.0])
    before = dict(batch.counts)
    batch.weight = plugin(outside="mask").miles_token_weight(batch)["correction"].factor
    terms = batch.weighed(torch.ones(len(batch.mask)))
    assert batch.counts == before
    assert float((terms * batch.mask).sum()) / batch.counts["token"] == pytest.approx((E(0.5) + 0 + 1) / 3, rel=1e-5)


def test_a_mean_over_the_tokens_that_an_update_keeps_on_all_of_its_ranks():
    """Two micro-batches of one update, of which half of the tokens are another rank's; and one of another update."""
    keys = {"outside": "mask", "denominator": "token"}
    one, two, other = gaps([0.5, 1.0], [0.0]), gaps([2.0]), gaps([0.1, 0.1], [3.0])
    one.counts = two.counts = {"token": 8, "sample": 6, "unit": 6}
    masking = plugin(**keys)
    assert masking.miles_columns() == {"correction_logprobs": Column(role="policy")}
    masking.miles_normalize([one, two, other], lambda kept: kept + torch.tensor([1.0, 0.0]))
    # of the first update's 8 tokens 2 are kept here and 1 there; of the other's 3 there are 2
    assert factors(one, **keys)[0] == pytest.approx([E(0.5) * 8 / 3, 0.0, 8 / 3], rel=1e-5)
    assert factors(two, **keys)[0] == [0.0]
    assert factors(other, **keys)[0] == pytest.approx([E(0.1) * 3 / 2] * 2 + [0.0], rel=1e-5)


def test_what_needs_no_count_of_the_update_asks_for_none():
    for other in (plugin(), plugin(outside="mask", denominator="sequence"), plugin({}, denominator="token")):
        batch = gaps([0.5])
        other.miles_normalize([batch], total=None)
        assert other.miles_columns() == {} == batch.columns


def test_nothing_kept_is_nothing_and_no_division_by_it():
    batch = gaps([3.0], [])
    masking = plugin(outside="mask", denominator="token")
    masking.miles_normalize([batch], lambda kept: kept)
    assert factors(batch, outside="mask", denominator="token")[0] == [0.0]
    assert factors(batch, outside="mask", denominator="sequence")[0] == [0.0]


def test_a_batch_without_weights_is_weighed_as_it_is():
    batch = gaps([0.5])
    terms = torch.ones(2)
    assert batch.weighed(terms) is terms


@pytest.mark.parametrize("old", ["recomputed", "engine"])
def test_it_is_in_use_only_where_both_are_known(old):
    off = plugin(batch={"old_logprobs": old})
    assert off.miles_token_weight(gaps([0.5])) == {}


@pytest.mark.parametrize(
    ("batch", "keys", "key", "said"),
    [
        (BOTH, {"lower": 3.0}, "correction.lower", "3.0 is above correction.upper = 2.0"),
        ({}, {"upper": 3.0}, "correction", 'has no effect without batch.old_logprobs = "both"'),
        ({"old_logprobs": "engine"}, {"level": "sequence"}, "correction", "has no effect"),
        (
            BOTH,
            {"gate": "geometric"},
            "correction.gate",
            'says what is masked, or what that does; say outside = "mask"',
        ),
        (BOTH, {"denominator": "token"}, "correction.denominator", 'say outside = "mask"'),
    ],
)
def test_what_cannot_work_is_said_with_its_key(batch, keys, key, said):
    found = []
    plugin(batch, **keys).miles_check(lambda *fault: found.append(fault))
    assert [k for k, _ in found] == [key] and said in found[0][1]


def test_what_works_is_not_complained_of():
    found = []
    for fine in (plugin(), plugin({}), plugin(level="geometric", upper=3.0, lower=0.5, outside="mask")):
        fine.miles_check(lambda *fault: found.append(fault))
    assert found == []


@pytest.mark.parametrize("key, value", [("upper", 0.0), ("lower", -0.1), ("level", "batch"), ("outside", "drop")])
def test_a_value_out_of_range_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        Correction.Config(**{key: value})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mode": "async"}, "none: tokens up to 2 versions old count as if they were new ones; batch.old_logprobs ="),
        ({"mode": "async", "batch": {"old_logprobs": "engine"}}, ""),
        ({"mode": "async", "rollout": {"max_staleness": 0}}, ""),
        ({"mode": "overlap"}, ""),
    ],
)
def test_the_plan_says_where_stale_tokens_count_like_new_ones(keys, said):
    run = RunConfig.model_validate({"algorithm": "a", "model": {"path": "m"}} | keys)
    told = Correction(Correction.Config(), run).miles_explain()
    assert told.get("correction", "").startswith(said) and bool(told) == bool(said)
