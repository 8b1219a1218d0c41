"""Four GPUs: two training ranks that hold one model together, and two engines with a GPU each."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_cases import free_everywhere
from test_gpu_run import assert_nothing_is_left, folder, metrics, start, story

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("four_gpus"), pytest.mark.timeout(500)]
__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("kind", ["pipeline", "tensor"])
def test_a_model_in_two_parts_moves_to_two_engines(folder: Path, sglang: Path, kind: str) -> None:
    """Each pipeline stage sends its own layers, in a group of its own; a tensor-parallel pair sends what it gathered.

    Every tensor of version 0 is compared with what the engines read from the disk, before the first step.
    """
    before = free_everywhere()
    options = ("placement.layout=split", "mode=overlap", "placement.trainers=2", "placement.engines=2", "steps=4")
    options += (f"run_dir={kind}", f"megatron.{kind}_model_parallel_size=2", "sglang.bucket_mib=1")
    process = start(folder, sglang, *(word for option in options for word in ("--set", option)))
    try:
        out, _ = process.communicate(timeout=420)
    finally:
        process.kill()
    assert process.returncode == 0, (out, story(folder, kind))
    assert_nothing_is_left(folder, before)
    steps = metrics(folder, kind)
    assert [row["step"] for row in steps] == list(range(1, 5))
    assert max(row["kl/train_rollout"] for row in steps if row["staleness/max"] == 0) < 0.02
    assert max(row["kl/train_rollout"] for row in steps) < 0.1  # later ones are one version behind
