"""Stands in for SGLang's compiled kernels, of which PyPI has builds for GPUs only.

SGLang looks names up here as it is imported, and in float32 on one CPU never calls what it finds. Every name is
therefore there, and whoever calls one learns which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.4.10"  # what SGLang 0.5.23 asks for


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there on a CPU")

    return kernel
