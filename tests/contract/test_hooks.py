"""Promises the core makes about its hooks."""

from __future__ import annotations

import inspect

import pytest
from miles_core.hookspecs import Hooks
from miles_core.plugins import SPECS


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_says_what_it_is(name: str) -> None:
    spec = SPECS[name]
    assert name.startswith("miles_")
    assert spec.kind in ("slot", "first", "merge", "event") and set(spec.places) <= {"driver", "rollout", "trainer"}
    assert inspect.getdoc(spec), "a hook says what it is for"
    signature = inspect.signature(spec)
    assert signature.return_annotation is not signature.empty
    for argument in list(signature.parameters.values())[1:]:
        assert argument.annotation is not argument.empty and argument.default is argument.empty


def test_only_an_event_answers_nothing() -> None:
    silent = {name for name, spec in SPECS.items() if inspect.signature(spec).return_annotation in ("None", None)}
    assert silent == {name for name, spec in SPECS.items() if spec.kind == "event"}


def test_a_first_may_decline_and_a_merge_is_a_dict() -> None:
    for name, spec in SPECS.items():
        answer = str(inspect.signature(spec).return_annotation)
        assert answer.endswith("| None") == (spec.kind == "first"), name
        assert answer.startswith("dict[str, ") or spec.kind != "merge", name


def test_an_algorithm_owns_slots_only() -> None:
    assert {spec.kind for spec in SPECS.values() if spec.algorithm} == {"slot"}


def test_every_method_of_the_specification_is_a_hook() -> None:
    assert [name for name in vars(Hooks) if name.startswith("miles_")] == list(SPECS)
