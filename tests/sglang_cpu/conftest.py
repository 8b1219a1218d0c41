"""Tests with SGLang's own server on the CPU: ``nox -s sglang_cpu``, whose environment has what that takes.

The server takes a minute to start, so one serves all tests but the last of a file, which have it replaced or ended.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    stands_in = find_spec("sglang") and "SGLANG_USE_CPU_ENGINE" in os.environ  # a variable of SGLang's own
    for item in items:
        if HERE in item.path.parents and not stands_in:
            item.add_marker(pytest.mark.skip(reason="needs SGLang on the CPU: run `nox -s sglang_cpu`"))


@pytest.fixture(scope="session")
def weights() -> Any:
    """The weights of every version: the reference that the server is compared with."""
    from cpu_cases import Weights

    return Weights()


@pytest.fixture(scope="session")
def folder(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk, which is version 0."""
    folder = tmp_path_factory.mktemp("tiny")
    weights.of(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Any]:
    from cpu_cases import CPU, arguments
    from serving import serving

    table = tomllib.loads(CPU.read_text())["sglang"]
    with serving(arguments(folder, table), host="127.0.0.1") as served:
        yield served


@pytest.fixture(scope="module")
def transport(served: Any) -> Iterator[Any]:
    """As the only training rank has one. The model takes several of its buckets."""
    from cpu_cases import BUCKET
    from miles_core.edges.sglang.broadcast import BroadcastTransport
    from miles_core.types import Layout

    transport = BroadcastTransport(1, BUCKET, 120)
    transport.connect([served.worker], Layout(rank=0, world=1, dp_rank=0, dp_size=1, last_stage=True, reports=True))
    yield transport
    transport.close()
