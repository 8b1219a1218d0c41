"""What pytest finds by its entry point ``pytest11``; imports nothing heavy, as every pytest in the environment does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .runs import Finished


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` of a few thousand random weights, ``train.jsonl`` and ``eval.jsonl``."""
    from .runs import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def miles_run(tiny_data: Path, tmp_path: Path) -> Callable[..., Finished]:
    """``miles_run("mine", steps=1, **{"mine.clip": 0.1})``: a real run of one step with the algorithm ``mine``, every
    process of it, in seconds. Other keys of the run by their dotted names; with ``placement.trainers`` = 2 it takes
    longer, for then they are processes. Each call of a test makes a run folder of its own."""
    from .runs import run

    def started(algorithm: str, **settings: object) -> Finished:
        folder = tmp_path / f"run-{1 + len(list(tmp_path.glob('run-*')))}"
        return run(algorithm, tiny_data, folder, settings)

    return started
