"""Estimates of the divergence between two policies from the tokens that one of them drew."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .surrogate import bounded

Estimator = Literal["k1", "k2", "k3"]


def divergence(logprobs: Tensor, ref: Tensor, estimator: Estimator) -> Tensor:
    """[T], estimates of KL(policy || ref) from tokens that the policy drew, with ``x = log p - log p_ref``:

    ``k1 = x``, ``k2 = x^2 / 2``, ``k3 = exp(-x) - 1 + x`` (Schulman 2020, "Approximating KL Divergence"; k3 is eq. 4 of
    arXiv:2402.03300). As a loss on the policy's own samples, k2 has the gradient of the divergence, k3 approximates it
    near the reference, and that of k1 is zero on average: k1 is for rewards, and for comparison.

    By hand, with x = log 2: k1 = 0.6931, k2 = 0.2402, k3 = 0.5 - 1 + 0.6931 = 0.1931.
    """
    x = bounded(logprobs - ref)
    if estimator == "k1":
        return x
    return x.square() / 2 if estimator == "k2" else torch.expm1(-x) + x
