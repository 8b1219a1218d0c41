"""What every algorithm must keep, as tests to inherit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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


class AlgorithmChecks:
    """Subclass it, name the plugin, and pytest runs every check on it::

    class TestMine(AlgorithmChecks):
        plugin = Mine
        keys = {"clip": 0.1}                     # of its table
        settings = {"batch.group_size": 4}       # of the run, by their dotted names
    """

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

    def case(self, seed: int) -> Case:
        return Case(self.build, seed, self.run_config.batch.group_size, self.given)

    # -- its table -----------------------------------------------------------------------------------------------

    def test_it_refuses_a_key_it_does_not_know(self) -> None:
        with pytest.raises(ValidationError):
            self.plugin.Config.model_validate({**self.keys, "no_such_key": 1})

    def test_its_table_survives_the_way_to_another_process(self) -> None:
        config = self.plugin.Config.model_validate(self.keys)
        assert self.plugin.Config.model_validate_json(config.model_dump_json()) == config

    @pytest.mark.parametrize("place", ["driver", "trainer"])
    def test_its_state_survives_a_restart(self, place: str) -> None:
        before = self.build(place).state()
        after = self.build(place)
        after.restore(state=json.loads(json.dumps(before)))
        assert after.state() == before

    # -- its numbers ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", SEEDS)
    def test_micro_batches_change_no_gradient(self, seed: int) -> None:
        same(self.case(seed).deal(ranks=1, budget=10**6), self.case(seed).deal(ranks=1, budget=12))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_order_of_packing_changes_no_gradient(self, seed: int) -> None:
        same(self.case(seed).deal(ranks=1, budget=30), self.case(seed).deal(ranks=1, budget=30, backwards=True))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_data_parallel_ranks_change_no_gradient(self, seed: int, ranks: int) -> None:
        same(self.case(seed).deal(ranks=1, budget=10**6), self.case(seed).deal(ranks=ranks, budget=20))

    def test_something_has_a_gradient(self) -> None:
        dealt = self.case(1).deal(ranks=1, budget=10**6)
        for role, of in self.case(1).roles.items():
            if of.trained:
                gradients = [g for sample in dealt.gradients.get(role, {}).values() for g in sample]
                assert any(gradients), f"no token of {role} has a gradient"

    def test_an_empty_micro_batch_adds_nothing(self) -> None:
        case, hooks = self.case(1), self.build("trainer")
        batch, ids = case.batch([])
        batch.columns |= hooks.advantage(batch=batch)
        hooks.normalize(batches=[batch], total=lambda tensor: tensor)
        for role, of in case.roles.items():
            if of.trained:
                loss, _ = case.loss(hooks, role, batch, ids)
                assert float(loss.detach()) == 0.0

    # -- a step of it --------------------------------------------------------------------------------------------

    def test_one_real_step_trains(self, miles_run: Callable[..., Finished]) -> None:
        algorithm = self.name if self.name in installed() else self.file
        keys = {f"{self.name}.{key}": value for key, value in self.keys.items()}
        done = miles_run(algorithm, **keys, **self.settings)
        assert done.status == 0, done.said
        assert len(done.metrics) == 2 and math.isfinite(done.metrics[1]["loss"])
        assert done.metrics[1]["grad_norm"] > 0
        assert done.hooks["miles_loss"] > 0 and done.hooks["miles_step_end"] == 2


def same(one: Dealt, other: Dealt) -> None:
    """Raise AssertionError where a loss or a gradient differs by more than float64 explains."""
    assert one.loss == pytest.approx(other.loss, rel=1e-9, abs=1e-12), "the loss differs"
    assert one.gradients.keys() == other.gradients.keys()
    for role, samples in one.gradients.items():
        assert samples.keys() == other.gradients[role].keys()
        for sample, gradient in samples.items():
            theirs = other.gradients[role][sample]
            assert gradient == pytest.approx(theirs, rel=1e-9, abs=1e-12), f"the gradient of {role} on {sample} differs"
