"""Formulas that algorithms share, for authors of plugins: plain functions of tensors, nothing of the loop.

Per-token tensors are [T] float32 and count on ``batch.mask`` only. ``bounded`` and all that use it are exact to the
float for policies that are not lost already.
"""

from .divergence import Estimator, divergence
from .surrogate import Aggregate, bounded, pessimistic, reduce

__all__ = ["Aggregate", "Estimator", "bounded", "divergence", "pessimistic", "reduce"]
