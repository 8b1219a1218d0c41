"""Whole runs: what they leave behind, that they repeat, and that being killed changes nothing."""

import random
import signal
import time

import pytest
import torch
from whole_runs import processes_of, timeless

pytestmark = pytest.mark.slow

PROMISED = {
    "step", "time_s", "reward/mean", "reward/std", "tokens_per_s", "loss", "kl/train_rollout", "weight_version",
    "staleness/max",
}  # fmt: skip


@pytest.fixture(scope="session", params=["sync", "overlap"])
def mode(request):
    return request.param


only_overlap = pytest.mark.parametrize("mode", ["overlap"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def whole(runs, mode):
    """A run that nothing disturbed."""
    runs.run(mode, "--set", f"mode={mode}")
    return runs.metrics(mode)


def test_a_run_leaves_what_was_promised(runs, mode, whole):
    steps = [row for row in whole if row["step"] > 0]
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert all(PROMISED <= row.keys() for row in steps)
    assert [row["step"] for row in whole if "eval/accuracy" in row] == [0, 3, 6]
    assert [row["weight_version"] for row in steps] == list(range(1, 7))
    stale = {"sync": [0] * 6, "overlap": [0] + [1] * 5}[mode]
    assert [row["staleness/max"] for row in steps] == stale
    folder = runs.folder / mode
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    for name in ("config.json", "manifest.json", "report.html", "model/config.json", "model/tokenizer.json"):
        assert (folder / name).is_file(), name


def test_engine_and_trainer_agree_on_what_was_sampled(whole, mode):
    fresh = [row for row in whole if row["step"] and not row["staleness/max"]]
    assert fresh and max(row["kl/train_rollout"] for row in fresh) < 1e-4


def test_the_exported_model_is_the_trained_one(runs, mode, whole):
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(runs.folder / "data" / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(runs.folder / mode / "model").state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@only_overlap
def test_killed_anywhere_and_resumed_it_is_the_same_run(runs, mode, whole):
    """Also the proof that a seed determines a run: every process of the second one is another. Overlapped, where groups
    wait when the checkpoint is written; in turns there are none, and the rest is the same."""
    name = f"{mode}-killed"
    step = random.Random(mode).randint(2, 5)
    process = runs.start(name, "--set", f"mode={mode}", start_new_session=True)
    wait_for_step(runs, name, step, process)
    process.kill()
    process.communicate()
    wait_until_gone(str(runs.folder / name))
    out = runs.run(name, "--set", f"mode={mode}", "--resume").stdout
    # The newest one, unless it was being written.
    assert any(f"going on after step {n}" in out for n in (step - step % 2, step - step % 2 - 2)) or step < 4
    assert timeless(runs.metrics(name)) == timeless(whole)
    mine, theirs = runs.weights(name), runs.weights(mode)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ended_by_a_signal_nothing_is_left_behind(runs, how):
    name = f"ended-{how.name}"
    process = runs.start(name, "--set", "steps=1000")
    wait_for_step(runs, name, 1, process)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    wait_until_gone(str(runs.folder / name))


def wait_for_step(runs, name, step, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if runs.metrics(name)[-1]["step"] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"{name} did not reach step {step}")


def wait_until_gone(marker, seconds=30):
    deadline = time.monotonic() + seconds
    while left := processes_of(marker):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
