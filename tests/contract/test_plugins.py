"""Promises that every installed plugin keeps, core's own included."""

from __future__ import annotations

from typing import Any

import pytest
from miles_core.config import RunConfig
from miles_core.plugins import BUILTIN, Plugin, Registry, installed

FOUND = installed()
THEIRS = [name for name in FOUND if name not in BUILTIN]


def build(name: str, run: RunConfig) -> Plugin:
    cls = FOUND[name].load()
    return cls(cls.Config(), run)


@pytest.fixture
def run(tmp_path: Any) -> RunConfig:
    return RunConfig.model_validate({"algorithm": "core", "model": {"path": str(tmp_path)}})


@pytest.mark.parametrize("name", FOUND)
def test_it_works_with_an_empty_table(name: str, run: RunConfig) -> None:
    assert build(name, run).run is run


@pytest.mark.parametrize("name", FOUND)
def test_its_table_survives_the_way_to_a_worker(name: str) -> None:
    config = FOUND[name].load().Config()
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", FOUND)
def test_it_refuses_a_key_it_does_not_know_or_takes_all(name: str) -> None:
    assert FOUND[name].load().Config.model_config.get("extra") in ("forbid", "allow")


@pytest.mark.parametrize("place", ["driver", "rollout", "trainer"])
def test_core_alone_leaves_only_the_loss_unanswered(place: Any, run: RunConfig) -> None:
    """What core brings fills every slot but the one that makes an algorithm, and every pair of its plugins agrees."""
    plugins = {name: build(name, run) for name in BUILTIN}
    with pytest.raises(Exception, match="does not answer miles_loss"):
        Registry(place, plugins, run)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("place", ["driver", "rollout", "trainer"])
def test_it_stands_alone_beside_core(place: Any, name: str, run: RunConfig) -> None:
    plugins = {name: build(name, run)} | {builtin: build(builtin, run) for builtin in BUILTIN}
    if "miles_loss" in dir(plugins[name]):
        registry = Registry(place, plugins, run.model_copy(update={"algorithm": name}))
        assert registry.owner["miles_loss"] == name
