"""What every test relies on: one thread per process, and the same examples every time."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported, here or in a child: several processes share few cores, and OpenMP threads that wait for a
# core spin.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("miles", deadline=None, derandomize=True)
settings.load_profile("miles")


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """A Ray that all runs of a module have their processes on, which are each run's own. Starting and ending a Ray is
    more work than a short run; tests that start one a run are there for that."""
    from miles_core.edges.cluster.session import Session

    session = Session(
        {"address": "local", "num_cpus": 16, "object_store_memory": 200 << 20, "include_dashboard": False}
    )
    session.ready.result(120)
    yield
    session.end()
