"""What every test relies on: one thread per process, and the same examples every time."""

from __future__ import annotations

import os

# Before torch is imported, here or in a child: several processes share few cores, and OpenMP threads that wait for a
# core spin.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings  # noqa: E402

settings.register_profile("miles", deadline=None, derandomize=True)
settings.load_profile("miles")
