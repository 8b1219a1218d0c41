"""Packing keeps every unit whole and every denominator the same, whatever the layout."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from miles_core.packing import count, distribute, pack
from miles_core.types import Column, Sample


def sample(length: int, trained: int) -> Sample:
    tokens = list(range(length))
    mask = [i >= length - trained for i in range(length)]
    return Sample(tokens=tokens, mask=mask, logprobs=[-0.5 * m for m in mask], versions=[0] * length, score=1.0)


lengths = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
units = st.lists(st.lists(lengths.map(lambda x: sample(*x)), min_size=1, max_size=3), max_size=40)


@given(units, st.integers(1, 5), st.integers(1, 100))
def test_every_unit_is_packed_once_and_whole(units, ranks, budget):
    rows = distribute(units, ranks, budget)
    placed = [id(unit) for rank in rows for row in rank for unit in row]
    assert sorted(placed) == sorted(map(id, units))


@given(units, st.integers(1, 5), st.integers(1, 100))
def test_a_row_is_within_budget_or_holds_one_unit(units, ranks, budget):
    for rank in distribute(units, ranks, budget):
        for row in rank:
            assert len(row) <= 1 or sum(len(s.tokens) for unit in row for s in unit) <= budget


@given(units, st.integers(1, 5), st.integers(1, 100))
def test_every_rank_has_as_many_rows(units, ranks, budget):
    rows = distribute(units, ranks, budget)
    assert len(rows) == ranks
    assert len({len(rank) for rank in rows}) == 1
    assert len(rows[0]) >= 1


@given(units, st.integers(1, 4), st.integers(20, 100))
def test_what_the_rows_hold_adds_up_to_the_denominators(units, ranks, budget):
    packed = [pack(row, {}) for rank in distribute(units, ranks, budget) for row in rank]
    counts = count(units)
    assert max(sum(int(p.mask.sum()) for p in packed), 1) == counts["token"]
    assert max(sum(len(p.lengths) for p in packed), 1) == counts["sample"]
    assert max(sum(len(set(p.unit.tolist())) for p in packed), 1) == counts["unit"]


@given(st.lists(st.tuples(st.integers(1, 60), st.just(1)), min_size=8, max_size=60), st.integers(2, 4))
def test_ranks_carry_about_the_same(sizes, ranks):
    units = [[sample(n + 1, 1)] for n, _ in sizes]
    loads = [sum(len(u[0].tokens) for row in rank for u in row) for rank in distribute(units, ranks, 64)]
    assert max(loads) - min(loads) <= max(len(u[0].tokens) for u in units)  # longest first is never worse


def test_a_batch_knows_where_each_sequence_is():
    batch = pack([[sample(3, 1), sample(2, 1)], [sample(4, 2)]], {}).to_batch(
        {"token": 4, "sample": 3, "unit": 2}, 1.0, "cpu"
    )
    assert batch.starts.tolist() == [0, 3, 5, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.seq.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert batch.unit.tolist() == [0, 0, 1]
    assert batch.lengths.tolist() == [1, 1, 2]
    assert batch.by_seq(batch.rollout_logprobs).tolist() == [-0.5, -0.5, -1.0]


def test_an_empty_row_is_a_batch_of_nothing():
    batch = pack([], {"seen": Column()}).to_batch({"token": 1, "sample": 1, "unit": 1}, 1.0, "cpu")
    assert batch.tokens.shape == batch.columns["seen"].shape == (0,)
    assert batch.starts.tolist() == [0]
    assert batch.by_seq(batch.rollout_logprobs).shape == (0,)


def test_a_recorded_column_is_padded_where_a_sample_recorded_nothing():
    with_it, without = sample(3, 1), sample(2, 1)
    with_it.columns["seen"] = [1.0, 2.0, 3.0]
    packed = pack([[with_it], [without]], {"seen": Column(pad=-1.0), "ref": Column(role="ref")})
    np.testing.assert_array_equal(packed.columns["seen"], [1, 2, 3, -1, -1])
    assert "ref" not in packed.columns
