"""The weight of the divergence from the reference, steered towards a target."""

from __future__ import annotations


def adapted(beta: float, divergence: float, target: float, samples: int, horizon: int) -> float:
    """``beta (1 + n e / horizon)`` with ``e = clip(d / target - 1, -0.2, 0.2)``: Ziegler et al. 2019, arXiv:1909.08593,
    section 2.2, for n samples at once.

    ``divergence`` is the mean over trained tokens. By hand, with beta = 0.1, d = 0.03, target = 0.02, n = 1000 and a
    horizon of 10,000: e = 0.2, beta = 0.102.
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)
