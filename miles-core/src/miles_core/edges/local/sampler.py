"""Draw tokens from logits: every row by its own parameters and its own random numbers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocols import Sampling

GREEDY, PLAIN, FILTERED = 0, 1, 2
_GAMMA, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Sampler:
    """Sampling parameters by row of the batch, and the state of each row's random stream.

    The numbers of a row are a function of its request's seed and of how many it drew before: neighbours, batch
    composition and the row it stands in change nothing. The stream is SplitMix64 (Steele, Lea and Flood, "Fast
    Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 17).
    """

    def __init__(self, rows: int) -> None:
        self._kind = np.zeros(rows, np.int8)
        self._scale = np.ones(rows, np.float32)  # of the logits: 1 / temperature
        self._top_p = np.ones(rows, np.float32)
        self._top_k = np.zeros(rows, np.int64)
        self._state = np.zeros(rows, np.uint64)

    def put(self, start: int, samplings: list[Sampling], seeds: list[int], drawn: list[int] | None = None) -> None:
        """Give the rows from ``start`` on to requests; ``drawn`` says how many numbers each has drawn before."""
        rows = slice(start, start + len(seeds))
        self._kind[rows] = [_kind(sampling) for sampling in samplings]
        self._scale[rows] = [1.0 / (sampling.temperature or 1.0) for sampling in samplings]
        self._top_p[rows] = [sampling.top_p for sampling in samplings]
        self._top_k[rows] = [sampling.top_k for sampling in samplings]
        # Mixed once, so that the streams of seeds 1 and 2 are not one stream, shifted.
        mixed = _mix(np.array([seed % 2**64 for seed in seeds], np.uint64))
        self._state[rows] = mixed + _GAMMA * np.array(drawn or [0] * len(seeds), np.uint64)

    def move(self, sources: list[int], rows: list[int]) -> None:
        """What is in rows ``sources`` goes on in ``rows``."""
        for array in (self._kind, self._scale, self._top_p, self._top_k, self._state):
            array[rows] = array[sources]

    def draw(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """One token for each of the rows from ``start`` on, from their logits [n, vocab] float32.

        Returns tokens [n] int64 and log-probabilities [n] float32 under the distribution drawn from: the softmax of
        logits / temperature, cut to its top k tokens and renormalized, then to the fewest of these that hold top-p of
        the mass and renormalized. Of a greedy row, the best token and its log-probability at temperature 1.
        """
        rows = slice(start, start + len(logits))
        if (scale := self._scale[rows]).max() != 1.0 or scale.min() != 1.0:
            logits = logits * torch.from_numpy(scale)[:, None]
        uniform, kinds = torch.from_numpy(self._uniform(rows)), self._kind[rows]
        if (kinds == kinds[0]).all():
            return self._draw(kinds[0], logits, uniform, rows)
        tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            at = torch.from_numpy(members)
            tokens[at], logprobs[at] = self._draw(kind, logits[at], uniform[at], start + members)
        return tokens, logprobs

    def _draw(
        self, kind: int, logits: Tensor, uniform: Tensor, rows: slice | NDArray[np.intp]
    ) -> tuple[Tensor, Tensor]:
        if kind == GREEDY:
            logprobs, tokens = logits.log_softmax(-1).max(-1)
            return tokens, logprobs
        mass = torch.softmax(logits, -1)
        if kind == PLAIN:
            return invert(mass, uniform)
        top_k, top_p = torch.from_numpy(self._top_k[rows]), torch.from_numpy(self._top_p[rows])
        kept, order = filtered(mass, top_k, top_p)
        places, logprobs = invert(kept, uniform)
        return order.gather(1, places[:, None])[:, 0], logprobs

    def _uniform(self, rows: slice) -> NDArray[np.float32]:
        """[n] float32 in [0, 1), a multiple of 2^-23: times a float32 total it stays below that total."""
        self._state[rows] += _GAMMA
        top = _mix(self._state[rows]) >> np.uint64(41)
        return top.astype(np.float32) * np.float32(2**-23)


def _kind(sampling: Sampling) -> int:
    if sampling.temperature == 0:
        return GREEDY
    return FILTERED if sampling.top_p < 1.0 or sampling.top_k > 0 else PLAIN


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (state ^ (state >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling from unnormalized ``mass`` [n, m] at ``uniform`` [n]: places [n], log-probabilities [n].

    A place without mass is never chosen: it ends where the one before it ended, and the search wants more than that.
    """
    ends = mass.cumsum(-1)
    total = ends[:, -1:]
    places = torch.searchsorted(ends, uniform[:, None] * total, right=True).clamp_max_(mass.shape[1] - 1)
    return places[:, 0], (mass.gather(1, places) / total).log_()[:, 0]


def filtered(mass: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order with those outside top-k and top-p set to 0, [n, m], and their tokens [n, m].

    ``top_k`` [n] int64, 0 for all; ``top_p`` [n] float32. Top-p is taken of the mass that top-k leaves; the first
    token always stays.
    """
    width = mass.shape[1]
    if (widest := int(top_k.max())) < width and int(top_k.min()) > 0:
        width = widest
    mass, order = mass.topk(width, -1)
    outside = torch.arange(width) >= torch.where(top_k > 0, top_k, width)[:, None]
    mass = mass.masked_fill(outside, 0.0)
    ends = mass.cumsum(-1)
    beyond = (ends - mass >= top_p[:, None] * ends[:, -1:]) & (top_p < 1.0)[:, None]
    beyond[:, 0] = False
    return mass.masked_fill_(beyond, 0.0), order
