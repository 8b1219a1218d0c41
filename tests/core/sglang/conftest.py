"""Both of the protocol's dialects."""

from __future__ import annotations

import pytest
from sglang_cases import DIALECTS


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)
