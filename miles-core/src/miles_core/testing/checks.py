"""What every algorithm must keep, as tests to inherit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from inspect import getsourcefile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from pydantic import ValidationError

from ..config import RunConfig
from ..plugins import Plugin, Registry, installed
from .cases import Case, Dealt, registry

if TYPE_CHECKING:
    from .runs import Finished

SEEDS = range(5)


class Subject:
    """An algorithm, and the run that it is tried in."""

    plugin: ClassVar[type[Plugin]]
    keys: ClassVar[dict[str, Any]] = {}
    settings: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """What the run calls it: its entry point, or the file it is in."""
        where = f"{self.plugin.__module__}:{self.plugin.__qualname__}"
        found = [name for name, found in installed().items() if found.entry.value == where]
        return found[0] if found else Path(self.file).stem

    @property
    def file(self) -> str:
        return getsourcefile(self.plugin) or ""

    @property
    def run_config(self) -> RunConfig:
        tree: dict[str, Any] = {"algorithm": self.name, "model": {"path": "model"}, "batch": {"group_size": 4}}
        for key, value in self.settings.items():
            *tables, last = key.split(".")
            node = tree
            for table in tables:
                node = node.setdefault(table, {})
            node[last] = value
        return RunConfig.model_validate({key: tree[key] for key in tree if key in RunConfig.model_fields})

    @property
    def given(self) -> bool:
        """Whether the data holds the responses."""
        return bool(self.settings.get("data.responses"))

    def build(self, place: str) -> Registry:
        return registry(place, self.name, self.plugin, self.keys, self.run_config)

    def start(self, miles_run: Callable[..., Finished], **more: Any) -> Finished:
        """A real run of it."""
        algorithm = self.name if self.name in installed() else self.file
        keys = {f"{self.name}.{key}": value for key, value in self.keys.items()}
        done = miles_run(algorithm, **keys, **{**self.settings, **more})
        assert done.status == 0, done.said
        return done


class AlgorithmChecks(Subject):
    """Subclass it, name the plugin, and pytest runs every check on it::

    class TestMine(AlgorithmChecks):
        plugin = Mine
        keys = {"clip": 0.1}                     # of its table
        settings = {"batch.group_size": 4}       # of the run, by their dotted names
    """

    def case(self, seed: int, build: Callable[[str], Registry] | None = None) -> Case:
        return Case(build or self.build, seed, self.run_config.batch.group_size, self.given)

    # -- its table -----------------------------------------------------------------------------------------------

    def test_it_refuses_a_key_it_does_not_know(self) -> None:
        with pytest.raises(ValidationError):
            self.plugin.Config.model_validate({**self.keys, "no_such_key": 1})

    def test_its_table_survives_the_way_to_another_process(self) -> None:
        config = self.plugin.Config.model_validate(self.keys)
        assert self.plugin.Config.model_validate_json(config.model_dump_json()) == config

    def test_its_state_survives_a_restart(self) -> None:
        """Driver and trainer take a step, their state goes to others through JSON, which take the next one alike."""
        old, new = cache(self.build), cache(self.build)  # a process of each place, that lives through several steps
        first = self.case(1, old)
        first.deal(ranks=1, budget=10**6)
        first.tell("miles_step_end", step=1, metrics={})
        for place in ("driver", "trainer"):
            state = json.loads(json.dumps(old(place).state()))
            new(place).restore(state=state)
            after = json.loads(json.dumps(new(place).state()))
            assert after == state, f"the {place}'s state after a step is not what miles_restore brings back"
        one, other = (self.case(2, build).deal(ranks=1, budget=10**6) for build in (old, new))
        same(one, other, "of the step after a restart ")

    # -- its numbers ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", SEEDS)
    def test_micro_batches_change_no_gradient(self, seed: int) -> None:
        case = self.case(seed)
        same(case.deal(ranks=1, budget=10**6), case.deal(ranks=1, budget=12))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_order_of_packing_changes_no_gradient(self, seed: int) -> None:
        case = self.case(seed)
        same(case.deal(ranks=1, budget=30), case.deal(ranks=1, budget=30, backwards=True))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_data_parallel_ranks_change_no_gradient(self, seed: int, ranks: int) -> None:
        case = self.case(seed)
        same(case.deal(ranks=1, budget=10**6), case.deal(ranks=ranks, budget=20))

    def test_something_has_a_gradient(self) -> None:
        case = self.case(1)
        dealt = case.deal(ranks=1, budget=10**6)
        for role in case.trained:
            gradients = [g for sample in dealt.gradients.get(role, {}).values() for g in sample]
            assert any(gradients), f"no token of {role} has a gradient"

    def test_an_empty_micro_batch_adds_nothing(self) -> None:
        """Ranks that have less data than others run such, in step with them."""
        for role, share in self.case(1).alone([]).items():
            for name, number in {"loss": share.loss, **share.metrics}.items():
                assert float(number.detach()) == 0.0, f"the {name} of {role} is {float(number.detach())}"
            assert share.backward() == []

    def test_samples_that_the_policy_wrote_nothing_of_stay_finite(self) -> None:
        """Such as those whose tokens are all a tool's: a mean over their tokens would divide by 0."""
        case = self.case(1)
        for role, share in case.alone(case.without_tokens()).items():
            finite({f"{role}: loss": float(share.loss.detach())})
            finite({f"{role}: {name}": float(number.detach()) for name, number in share.metrics.items()})
            finite({f"{role}: gradient": sum(map(abs, share.backward()))})

    # -- a step of it --------------------------------------------------------------------------------------------

    def test_one_real_step_trains(self, miles_run: Callable[..., Finished]) -> None:
        done = self.start(miles_run)
        assert len(done.metrics) == 2 and math.isfinite(done.metrics[1]["loss"])
        assert done.metrics[1]["grad_norm"] > 0
        assert done.calls["trainer", "miles_loss"] > 0 and done.calls["driver", "miles_step_end"] == 2


class LayoutChecks(Subject):
    """Real processes take the steps of one. Subclass it beside ``AlgorithmChecks``; each check starts a Ray on this
    machine, which makes it slow::

    @pytest.mark.slow
    class TestMineOnSeveralRanks(LayoutChecks):
        plugin = Mine
    """

    layouts: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"placement.trainers": 2},
        "tensor": {"placement.trainers": 2, "megatron.tensor_model_parallel_size": 2},
    }

    @pytest.mark.parametrize("layout", ["data", "tensor"])
    def test_two_ranks_take_the_steps_of_one(self, layout: str, miles_run: Callable[..., Finished]) -> None:
        steps = {"steps": 2, "eval.every": 0, "batch.micro_tokens": 32}
        alone, two = (self.start(miles_run, **{**steps, **ranks}) for ranks in ({}, self.layouts[layout]))
        assert two.calls["trainer", "miles_model"] == 2 * alone.calls["trainer", "miles_model"]
        for one, other in zip(alone.metrics, two.metrics, strict=True):
            mine, theirs = descended(one), descended(other)
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), f"step {one['step']} on {layout}-parallel ranks"


def descended(row: dict[str, float]) -> dict[str, float]:
    """Losses and the sizes of gradients, of every role. Other metrics may count what is above a threshold, which a
    rounding error can move it over."""
    return {key: value for key, value in row.items() if key.rpartition("/")[2] in ("loss", "grad_norm")}


def finite(numbers: dict[str, float]) -> None:
    """Raise AssertionError naming those that are not."""
    wrong = [f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
    assert not wrong, ", ".join(wrong)


def same(one: Dealt, other: Dealt, which: str = "") -> None:
    """Raise AssertionError where a loss, a metric or a gradient is not finite, or differs by more than float64
    explains."""
    for dealt in (one, other):
        finite(dealt.numbers)
        for role, samples in dealt.gradients.items():
            finite({f"the gradient of {role} on {sample}": sum(map(abs, g)) for sample, g in samples.items()})
    assert one.numbers.keys() == other.numbers.keys()
    for name, number in one.numbers.items():
        message = f"{name} {which}differs: it must be a sum, over what it is said to be a sum over"
        assert number == pytest.approx(other.numbers[name], rel=1e-9, abs=1e-12), message
    for role, samples in one.gradients.items():
        assert samples.keys() == other.gradients[role].keys()
        for sample, gradient in samples.items():
            theirs = other.gradients[role][sample]
            message = f"the gradient {which}of {role} on {sample} differs"
            assert gradient == pytest.approx(theirs, rel=1e-9, abs=1e-12), message
