"""Formulas that algorithms share, for authors of plugins: plain functions of tensors, nothing of the loop.

The names of their choices stand here, for tables of keys; the functions are in ``terms``, which imports torch.
"""

from typing import Literal

Aggregate = Literal["token", "sequence", "constant"]  # see terms.reduce
Estimator = Literal["k1", "k2", "k3"]  # see terms.divergence
