"""The kit for authors of plugins: what pytest needs to try one out, from its formulas to a step of a real run.

``AlgorithmChecks`` is a class of tests to subclass, and so is ``LayoutChecks``, of several real processes. The fixtures
``tiny_data`` and ``miles_run`` are there wherever miles-core is installed beside pytest.
"""

from typing import TYPE_CHECKING, Any

from .runs import Finished, run, write_tiny

if TYPE_CHECKING:
    from .checks import AlgorithmChecks, LayoutChecks

__all__ = ["AlgorithmChecks", "Finished", "LayoutChecks", "run", "write_tiny"]


def __getattr__(name: str) -> Any:
    """The checks need pytest; what writes the data of an example must do without."""
    if name not in ("AlgorithmChecks", "LayoutChecks"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import checks

    return getattr(checks, name)
