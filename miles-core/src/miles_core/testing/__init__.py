"""The kit for authors of plugins: what pytest needs to try one out, from its formulas to a step of a real run.

``AlgorithmChecks`` is a class of tests to subclass, and so is ``LayoutChecks``, of several real processes. The fixtures
``tiny_data`` and ``miles_run`` are there wherever miles-core is installed beside pytest.
"""

from .checks import AlgorithmChecks, LayoutChecks
from .runs import Finished, run, write_tiny

__all__ = ["AlgorithmChecks", "Finished", "LayoutChecks", "run", "write_tiny"]
