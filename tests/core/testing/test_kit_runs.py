"""The fixtures run the real loop, quickly, and the recorder sees all of it."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from miles_core.plugins import SPECS, Plugin
from miles_core.testing import AlgorithmChecks, Finished, LayoutChecks

MINE = """\
import torch.distributed as dist
from miles_core import Plugin, hookimpl
from miles_core.types import Loss


class Mine(Plugin):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return Loss((-batch.columns["advantage"] * output.logprobs * batch.mask).sum(){more})

    @hookimpl
    def miles_state(self):
        return {"steps": 1}
"""


def write(folder: Path, more: str = "") -> Path:
    file = folder / "mine.py"
    file.write_text(MINE.replace("{more}", more))
    return file


def loaded(file: Path) -> type[Plugin]:
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Plugin] = module.Mine
    return found


def checks(base: type, file: Path) -> AlgorithmChecks | LayoutChecks:
    plugin = loaded(file)
    made = type("Checks", (base,), {"plugin": plugin, "file": str(file)})()
    assert isinstance(made, AlgorithmChecks | LayoutChecks) and made.name == "mine"
    return made


def test_a_real_step_takes_less_than_ten_seconds(miles_run: Callable[..., Finished], tmp_path: Path) -> None:
    """Of this process, which it is all in; on a busy machine it waits for its turn longer than that."""
    file, began = write(tmp_path), time.process_time()
    done = miles_run(str(file))
    assert time.process_time() - began < 10
    assert done.status == 0, done.said
    assert [row["step"] for row in done.metrics] == [0, 1] and done.metrics[1]["grad_norm"] > 0


def test_the_recorder_sees_every_hook_of_a_step_in_its_place(
    miles_run: Callable[..., Finished], tmp_path: Path
) -> None:
    done = miles_run(str(write(tmp_path)), **{"batch.groups": 4, "eval.prompts": 8})
    assert done.calls["rollout", "miles_rollout"] == 4 + 8 + 8  # a group each, and an evaluation before and after
    assert done.calls["rollout", "miles_reward"] == 20
    assert done.calls["driver", "miles_group_end"] == 4
    assert done.calls["driver", "miles_state"] == done.calls["trainer", "miles_state"] == 1
    assert done.calls["trainer", "miles_loss"] == done.calls["trainer", "miles_penalty"] > 0
    assert all(place in SPECS[hook].places for place, hook in done.calls)
    assert done.hooks["miles_state"] == 2
    awaited = {hook for hook, spec in SPECS.items() if inspect.iscoroutinefunction(spec)}
    assert awaited <= done.hooks.keys()


def test_each_run_of_a_test_has_a_folder(miles_run: Callable[..., Finished], tmp_path: Path) -> None:
    file = str(write(tmp_path))
    one, two = miles_run(file), miles_run(file, **{"batch.groups": 2})
    assert one.folder != two.folder and len(one.metrics) == len(two.metrics) == 2


def test_a_run_that_fails_says_why(miles_run: Callable[..., Finished], tmp_path: Path) -> None:
    assert "nonsense: no such key" in miles_run(str(write(tmp_path)), nonsense=1).said
    done = miles_run(str(write(tmp_path, more=" * 0 + 1 / 0")))
    assert done.status == 2 and "plugin mine: miles_loss raised ZeroDivisionError" in done.said
    assert "return Loss(" not in done.said  # a sentence, no traceback


def test_a_vector_for_a_loss_is_named(miles_run: Callable[..., Finished], tmp_path: Path) -> None:
    done = miles_run(str(write(tmp_path, more=" * batch.mask")))
    assert done.status == 2 and "plugin mine: miles_loss answered a Loss of shape" in done.said


def test_the_check_of_a_real_step_passes_and_fails(miles_run: Callable[..., Finished], tmp_path: Path) -> None:
    checks(AlgorithmChecks, write(tmp_path)).test_one_real_step_trains(miles_run)
    with pytest.raises(AssertionError, match="grad_norm|0.0 > 0"):
        checks(AlgorithmChecks, write(tmp_path, more=" * 0")).test_one_real_step_trains(miles_run)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_ranks_that_disagree_fail_the_check_of_layouts(
    layout: str, miles_run: Callable[..., Finished], tmp_path: Path
) -> None:
    made = checks(LayoutChecks, write(tmp_path, more=" * (1 + dist.get_rank())"))
    with pytest.raises(AssertionError, match=f"step 1 on {layout}-parallel ranks"):
        made.test_two_ranks_take_the_steps_of_one(layout, miles_run)
