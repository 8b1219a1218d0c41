"""Which row comes when: a pure function of the seed, so that a run goes on wherever another one stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    Indices = NDArray[int64]

HELD_OUT, EPOCH = 0, 1  # apart, so that splitting and shuffling draw from different streams


def permutation(size: int, *key: int) -> Indices:
    """[size] int64: every row once. Sorts raw Philox draws, whose stream NumPy promises never to change."""
    import numpy

    draws = numpy.random.Philox(numpy.random.SeedSequence(key)).random_raw(size)
    order: Indices = numpy.argsort(draws, kind="stable")
    return order


def held_out_count(size: int, held_out: float) -> int:
    """How many of ``size`` rows ``held_out`` asks for: a fraction below 1 (at least one row), else a count."""
    return round(held_out) if held_out >= 1 else max(1, round(held_out * size)) if held_out else 0


def split(size: int, held_out: float, seed: int) -> tuple[Indices, Indices]:
    """Rows to train on and rows held out: disjoint, together all of them, each in the order of the file."""
    import numpy

    order = permutation(size, seed, HELD_OUT)
    cut = held_out_count(size, held_out)
    return numpy.sort(order[cut:]), numpy.sort(order[:cut])


def endless(rows: Indices, seed: int, shuffle: bool, start: int) -> Iterator[int]:
    """``rows`` over and over from the ``start``-th on; with ``shuffle`` every epoch in an order of its own."""
    first, skip = divmod(start, len(rows))
    for epoch in count(first):
        order: Any = rows[permutation(len(rows), seed, EPOCH, epoch)] if shuffle else rows
        for row in order[skip:]:
            yield int(row)
        skip = 0
