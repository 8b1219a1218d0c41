"""Whole runs in which engine and trainer share one GPU, started the way a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_cases import free, until
from together.whole_runs import processes_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
SHAPE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
RUN = """\
algorithm = "grpo"
steps = 1000
seed = 3

[model]
path = "model"

[data]
train = "train.jsonl"

[reward.positions]
weight = 1.0

[batch]
groups = 16
group_size = 8
updates = 2
micro_tokens = 1024

[rollout]
max_tokens = 4

[optim]
lr = 1e-4

[checkpoint]
every = 2

[placement]
layout = "colocate"

[sglang]
mem_fraction_static = 0.3
cuda_graph_max_bs_decode = 32
"""
LEFT = 256 << 20  # bytes that the GPU's own bookkeeping may differ by
GONE_S = 30.0


def example() -> ModuleType:
    """The arithmetic example's own script."""
    spec = spec_from_file_location("make_arithmetic", EXAMPLE / "make.py")
    assert spec and spec.loader
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has seen a few sums, its tokenizer, prompts, and the file of a run."""
    folder, make = tmp_path_factory.mktemp("run"), example()
    make.SHAPES["small"], make.WARM_UP_STEPS = (SHAPE, 1e-3), 100
    sums = [(a, b) for a in range(10, 50) for b in range(10, 50)]
    make.write_prompts(folder / "train.jsonl", sums[800:])
    make.write_model(folder / "model", sums[:800], "small")
    (folder / "run.toml").write_text(RUN)
    return folder


def start(folder: Path, sglang: Path, *options: str) -> subprocess.Popen[str]:
    cli = [sys.executable, "-c", "from miles_core.cli import main; main()", "run", "run.toml", str(sglang)]
    return subprocess.Popen(
        [*cli, "--set", "run_dir=out", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TERM": "dumb"},
    )


def metrics(folder: Path, name: str = "out") -> list[dict[str, float]]:
    try:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):  # not there yet, or half a line
        return []


def story(folder: Path, name: str = "out") -> str:
    """What a run that failed left behind, for the report."""
    logs = [*(folder / name).glob("logs/*.log"), folder / name / "error.log"]
    return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.exists())


def assert_nothing_is_left(folder: Path, before: int) -> None:
    """Neither a process that was started in ``folder`` nor memory on the GPU."""
    deadline = time.monotonic() + GONE_S
    while left := processes_of(str(folder)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    until(lambda: free() > before - LEFT, GONE_S, f"{before >> 20} MiB of the GPU are free again, as before the run")


@pytest.fixture(scope="module")
def ended(folder: Path, sglang: Path) -> int:
    """A run that was told to end after its fifth step or a little later; the last one that it finished."""
    before = free()
    process = start(folder, sglang)
    try:
        until(
            lambda: process.poll() is not None or (metrics(folder) and metrics(folder)[-1]["step"] >= 5),
            360,
            "the run does its fifth step",
        )
        assert process.poll() is None, (process.communicate()[0], story(folder))
        assert before - free() > 1 << 30, "while it ran its engine and its trainer were on this GPU"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, 2), out
    assert_nothing_is_left(folder, before)
    return int(metrics(folder)[-1]["step"])


def test_a_run_that_was_told_to_end_leaves_nothing_on_the_gpu(ended: int) -> None:
    assert ended >= 5


def test_a_run_goes_on_to_its_end_and_leaves_nothing(folder: Path, sglang: Path, ended: int) -> None:
    before, last = free(), ended + 4
    process = start(folder, sglang, "--resume", "--set", f"steps={last}")
    try:
        out, _ = process.communicate(timeout=420)
    finally:
        process.kill()
    assert process.returncode == 0, (out, story(folder))
    assert_nothing_is_left(folder, before)
    went_on = re.search(r"going on after step (\d+)", out)
    # The newest checkpoint, or the one before where that was still being written.
    assert went_on and ended - 4 < int(went_on[1]) <= ended and int(went_on[1]) % 2 == 0, out
    steps = metrics(folder)
    assert [row["step"] for row in steps] == list(range(1, last + 1))
    assert [row["weight_version"] for row in steps] == list(range(1, last + 1))
    assert max(row["kl/train_rollout"] for row in steps) < 0.02
    assert all(row["staleness/max"] == 0 for row in steps)
    assert (folder / "out" / "report.html").is_file()
    from safetensors.torch import load_file

    trained, first = (load_file(next(at.glob("*.safetensors"))) for at in (folder / "out" / "model", folder / "model"))
    assert trained.keys() == first.keys()
    moved = [name for name in trained if not torch.equal(trained[name].float(), first[name].float())]
    assert {name for name in trained if "proj" in name} <= set(moved)  # a norm's bfloat16 need not
