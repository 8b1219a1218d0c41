"""What is drawn, how often, and what is said about it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_core.edges.local.sampler import Sampler, filtered, invert
from miles_core.edges.protocols import Sampling

LOGITS = [1.5, -0.3, 0.0, 2.0, 0.9, -4.0, 1.1]
# The 99.9th percentile of chi-square with 1 to 6 degrees of freedom.
CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}


def expected(sampling: Sampling) -> torch.Tensor:
    """The distribution by its definition: one token after another, in float64."""
    p = torch.softmax(torch.tensor(LOGITS, dtype=torch.float64) / sampling.temperature, 0)
    ranked = sorted(range(len(LOGITS)), key=lambda token: -p[token])
    if sampling.top_k:
        p[ranked[sampling.top_k :]] = 0
    p /= p.sum()
    mass = 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            p[token] = 0
        else:
            mass += float(p[token])
    return p / p.sum()


def check_distribution(sampling: Sampling, seed: int) -> None:
    n, want = 20_000, expected(sampling)
    sampler = Sampler(n)
    sampler.put(0, [sampling] * n, list(range(seed, seed + n)))  # neighbouring seeds, as a careless caller gives
    tokens, logprobs = sampler.draw(torch.tensor(LOGITS).repeat(n, 1), 0)
    assert torch.allclose(logprobs.double(), want[tokens].log(), atol=1e-6)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    possible = want > 0
    assert counts[~possible].sum() == 0
    if (freedom := int(possible.sum()) - 1) > 0:
        chi2 = ((counts - n * want)[possible] ** 2 / (n * want)[possible]).sum()
        assert chi2 < CHI2[freedom]


def test_temperature() -> None:
    check_distribution(Sampling(1, temperature=1.0), 0)
    check_distribution(Sampling(1, temperature=0.6), 1)


def test_top_k() -> None:
    check_distribution(Sampling(1, top_k=3), 2)
    check_distribution(Sampling(1, top_k=100), 3)
    check_distribution(Sampling(1, top_k=1), 4)


def test_top_p() -> None:
    check_distribution(Sampling(1, top_p=0.7), 5)
    check_distribution(Sampling(1, top_p=1e-6), 6)


def test_top_p_is_of_what_top_k_leaves_after_temperature() -> None:
    check_distribution(Sampling(1, temperature=1.4, top_k=5, top_p=0.8), 7)


def test_a_row_draws_the_same_beside_any_other_kind() -> None:
    kinds = [Sampling(1), Sampling(1, top_k=2), Sampling(1, temperature=0.0), Sampling(1, 0.7, top_p=0.9)]
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    together, single = Sampler(40), Sampler(1)
    together.put(0, [kinds[row % 4] for row in range(40)], list(range(40)))
    tokens, logprobs = together.draw(logits, 0)
    for row in range(40):
        single.put(0, [kinds[row % 4]], [row])
        token, logprob = single.draw(logits[row : row + 1], 0)
        assert token == tokens[row]
        assert torch.allclose(logprob, logprobs[row], atol=1e-6)


def test_a_moved_row_goes_on_with_its_numbers() -> None:
    logits = torch.zeros(1, 1000)
    stays, moves = Sampler(8), Sampler(8)
    for sampler in (stays, moves):
        sampler.put(5, [Sampling(9)], [3])
        sampler.draw(logits, 5)
    moves.move([5], [0])
    assert [int(stays.draw(logits, 5)[0]) for _ in range(20)] == [int(moves.draw(logits, 0)[0]) for _ in range(20)]


def test_streams_are_uniform_and_do_not_repeat_each_other() -> None:
    sampler = Sampler(512)
    sampler.put(0, [Sampling(1)] * 512, list(range(512)))
    drawn = np.stack([sampler._uniform(slice(0, 512)) for _ in range(200)])
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    assert ((counts - drawn.size / 64) ** 2 / (drawn.size / 64)).sum() < 111  # 99.99th percentile, 63 degrees
    for a, b in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert np.corrcoef(drawn.T)[np.triu_indices(512, 1)].max() < 0.45  # of 200 draws each, over 130,816 pairs


masses = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e3)), min_size=1, max_size=40).filter(any)


@given(masses, st.integers(0, 2**23 - 1))
def test_what_has_no_mass_is_never_drawn(mass: list[float], draw: int) -> None:
    place, logprob = invert(torch.tensor([mass]), torch.tensor([draw * 2.0**-23]))
    assert mass[int(place)] > 0
    assert torch.isfinite(logprob).all()


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30), st.integers(0, 40), st.floats(0.01, 1.0))
def test_filters_keep_the_fewest_tokens_that_hold_top_p(logits: list[float], top_k: int, top_p: float) -> None:
    mass = torch.softmax(torch.tensor([logits]), -1)
    kept, order = filtered(mass, torch.tensor([top_k]), torch.tensor([top_p]))
    kept, width = kept[0].double(), top_k if 0 < top_k < len(logits) else len(logits)
    best = mass[0].double().sort(descending=True).values[:width]
    share, count = float(kept.sum() / best.sum()), int((kept > 0).sum())
    assert 1 <= count <= width
    assert len(set(order[0].tolist())) == len(order[0])
    assert torch.equal(kept[:count].float(), best[:count].float())  # the best ones, in order
    assert share >= top_p - 1e-5
    if count > 1:
        assert float(best[: count - 1].sum() / best.sum()) < top_p + 1e-5
