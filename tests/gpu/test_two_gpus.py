"""Two GPUs: the layouts of two training ranks, and a run whose engine has a GPU of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import SHAPE, free_everywhere, pack, run_of, sequences, trainer
from test_gpu_run import (
    assert_audited,
    assert_nothing_is_left,
    folder,
    metrics,
    resumed_with_a_kill,
    start,
    story,
    told_to_end,
)
from two_ranks import LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("two_gpus"), pytest.mark.timeout(500)]
__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_every_layout_of_two_ranks_has_the_gradients_of_one(
    alone: None, tiny: Path, tmp_path: Path, layers: str, request: pytest.FixtureRequest
) -> None:
    if layers != "local":
        request.getfixturevalue("te")
    given = sequences((1100, 300, 40, 700, 2, 900), SHAPE["vocab_size"])
    norms: list[float] = []

    def veto(norm: float) -> str:
        norms.append(norm)
        return "only the gradients count here"

    with trainer(run_of(tiny), transformer_impl=layers) as one:
        one.learn([pack(given)])
        gradients = {name: tensor.cpu() for name, tensor in one.gradients().items()}
        one.model.step(veto)
    torch.save({"sequences": given, "gradients": gradients, "norm": norms[0]}, tmp_path / "case.pt")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = [
        subprocess.Popen(
            [sys.executable, here / "two_ranks.py", str(rank), tmp_path, tiny, layers],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"CUDA_VISIBLE_DEVICES": str(rank), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert all(f"{name} agrees" in said[0] for name in LAYOUTS)


def test_a_run_with_an_engine_of_its_own_overlaps_by_one_step(folder: Path, sglang: Path) -> None:
    """Weights travel by NCCL; those of version 0 are compared tensor by tensor before the first step."""
    before = free_everywhere()
    options = ("placement.layout=split", "mode=overlap", "steps=6", "run_dir=split", "sglang.bucket_mib=1")
    process = start(folder, sglang, *(word for option in options for word in ("--set", option)))
    try:
        out, _ = process.communicate(timeout=420)
    finally:
        process.kill()
    assert process.returncode == 0, (out, story(folder, "split"))
    assert_nothing_is_left(folder, before)
    steps = metrics(folder, "split")
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert [row["staleness/max"] for row in steps] == [0, 1, 1, 1, 1, 1]
    assert steps[0]["kl/train_rollout"] < 0.02
    assert_audited(folder, "split", 16 * 6)


def test_a_streaming_run_is_told_to_end_loses_its_server_and_ends(folder: Path, sglang: Path) -> None:
    """Updates come while requests are in flight, and the engine's GPU is given back with the trainer's."""
    keys = ("placement.layout=split", "mode=async", "rollout.max_staleness=1", "sglang.bucket_mib=1")
    options = [word for key in keys for word in ("--set", key)]
    ended = told_to_end(folder, sglang, "streaming", *options)
    last = ended + 20
    resumed_with_a_kill(folder, sglang, "streaming", ended, last, *options)
    steps = metrics(folder, "streaming")
    assert [row["weight_version"] for row in steps] == list(range(1, last + 1))
    assert all(0 <= row["staleness/max"] <= 1 for row in steps)
    assert max(row["staleness/max"] for row in steps) == 1, "it has never run ahead"
    assert steps[0]["kl/train_rollout"] < 0.02
