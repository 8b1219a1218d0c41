"""Whole runs in which engine and trainer share one GPU, started the way a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_cases import free_everywhere
from serving import until
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


CLI = [sys.executable, "-c", "from miles_core.cli import main; main()"]


def start(folder: Path, sglang: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "run", "run.toml", str(sglang), "--set", "run_dir=out", *options],
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
    """Neither a process that was started in ``folder`` nor memory on any GPU."""
    deadline = time.monotonic() + GONE_S
    while left := processes_of(str(folder)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    until(
        lambda: free_everywhere() > before - LEFT,
        GONE_S,
        f"{before >> 20} MiB of the GPUs are free again, as before the run",
    )


def assert_audited(folder: Path, name: str, trained: int) -> None:
    """Every prompt is in one state, none was skipped, none was trained on twice."""
    audit = subprocess.run([*CLI, "audit", name], cwd=folder, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert f"{trained} trained" in audit.stdout.replace(",", ""), audit.stdout


def reach(process: subprocess.Popen[str], folder: Path, name: str, step: int) -> None:
    """Wait until the run has done ``step``, and is not over."""

    def done() -> bool:
        rows = metrics(folder, name)
        return process.poll() is not None or bool(rows) and rows[-1]["step"] >= step

    until(done, 360, f"the run does its step {step}")
    assert process.poll() is None, (process.communicate()[0], story(folder, name))


def told_to_end(folder: Path, sglang: Path, name: str, *options: str) -> int:
    """A run that gets SIGTERM after its fifth step or a little later; the last one that it finished."""
    before = free_everywhere()
    process = start(folder, sglang, "--set", f"run_dir={name}", *options)
    try:
        reach(process, folder, name, 5)
        assert before - free_everywhere() > 1 << 30, "while it ran it was on the GPU"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, 2), out
    assert_nothing_is_left(folder, before)
    return int(metrics(folder, name)[-1]["step"])


def servers_of(folder: Path) -> list[int]:
    """SGLang's own processes of the runs in ``folder``: each is the child of a guard, and is none."""
    found = []
    for pid in (int(told.split()[0]) for told in processes_of(str(folder))):
        with suppress(OSError):  # it is gone by now
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            mine, above = (Path(f"/proc/{p}/cmdline").read_bytes() for p in (pid, parent))
            if b"guard.py" in above and b"guard.py" not in mine:
                found.append(pid)
    return found


def resumed_with_a_kill(folder: Path, sglang: Path, name: str, ended: int, last: int, *options: str) -> str:
    """A run that goes on behind step ``ended`` until ``last``, whose server is killed on the way; what it said."""
    before = free_everywhere()
    process = start(folder, sglang, "--set", f"run_dir={name}", "--resume", "--set", f"steps={last}", *options)
    try:
        reach(process, folder, name, ended + 1)
        [server] = servers_of(folder)
        os.kill(server, signal.SIGKILL)
        out, _ = process.communicate(timeout=420)
    finally:
        process.kill()
    assert process.returncode == 0, (out, story(folder, name))
    assert_nothing_is_left(folder, before)
    assert "is replaced: its server died" in (folder / name / "logs" / "engine-0.log").read_text()
    went_on = re.search(r"going on after step (\d+)", out)
    # The newest checkpoint, or the one before where that was still being written.
    assert went_on and ended - 4 < int(went_on[1]) <= ended and int(went_on[1]) % 2 == 0, out
    assert [row["step"] for row in metrics(folder, name)] == list(range(1, last + 1))
    assert_audited(folder, name, 16 * last)
    return str(out)


@pytest.fixture(scope="module")
def ended(folder: Path, sglang: Path) -> int:
    return told_to_end(folder, sglang, "out")


def test_a_run_that_was_told_to_end_leaves_nothing_on_the_gpu(ended: int) -> None:
    assert ended >= 5


def test_a_run_whose_server_is_killed_goes_on_to_its_end_and_leaves_nothing(
    folder: Path, sglang: Path, ended: int
) -> None:
    last = ended + 20  # so many that it cannot be over before its server is killed
    resumed_with_a_kill(folder, sglang, "out", ended, last)
    steps = metrics(folder)
    assert [row["weight_version"] for row in steps] == list(range(1, last + 1))
    assert max(row["kl/train_rollout"] for row in steps) < 0.02
    assert all(row["staleness/max"] == 0 for row in steps)
    assert (folder / "out" / "report.html").is_file()
    from safetensors.torch import load_file

    trained, first = (load_file(next(at.glob("*.safetensors"))) for at in (folder / "out" / "model", folder / "model"))
    assert trained.keys() == first.keys()
    moved = [name for name in trained if not torch.equal(trained[name].float(), first[name].float())]
    assert {name for name in trained if "proj" in name} <= set(moved)  # a norm's bfloat16 need not
