"""The kit's checks can fail: a wrong algorithm fails those that name its fault, and no other."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from textwrap import indent

import kit_cases
import pytest
from miles_core.testing import AlgorithmChecks
from miles_core.types import Refused

DOCS = Path(__file__).parents[3] / "docs"
QUICK = [name for name in dir(AlgorithmChecks) if name.startswith("test_") and name != "test_one_real_step_trains"]
PACKING = {
    "test_micro_batches_change_no_gradient",
    "test_the_order_of_packing_changes_no_gradient",
    "test_data_parallel_ranks_change_no_gradient",
}

NOTHING_WRITTEN = "test_samples_that_the_policy_wrote_nothing_of_stay_finite"


def failures(plugin: type, **more: object) -> dict[str, str]:
    """Which checks of ``plugin`` fail for some of their parameters, and what the first of those says."""
    checks = type("Checks", (AlgorithmChecks,), {"plugin": plugin, **more})()
    found: dict[str, str] = {}
    for name in QUICK:
        check = getattr(checks, name)
        marks = [mark.args for mark in getattr(check, "pytestmark", ())]
        for values in product(*(values for _, values in marks)):
            try:
                check(**dict(zip([argument for argument, _ in marks], values, strict=True)))
            except (Exception, pytest.fail.Exception) as error:
                found.setdefault(name, str(error))
    return found


def test_every_check_is_tried() -> None:
    assert len(QUICK) == 9


@pytest.mark.parametrize("plugin", [kit_cases.Good, kit_cases.Remembers], ids=lambda plugin: plugin.__name__)
def test_an_algorithm_that_keeps_to_everything_passes(plugin: type) -> None:
    assert failures(plugin) == {}


def written_on(page: str) -> type:
    """The algorithm for pairs that a page shows, whole or as a class's lines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "def miles_units" in block]
    if "class " not in code:
        code = "from torch.nn.functional import logsigmoid\n\nclass Pairs(Good):\n" + indent(code, "    ")
    space = {"__name__": "kit_cases"} | {name: getattr(kit_cases, name) for name in ("Good", "hookimpl", "Loss")}
    exec("from __future__ import annotations\n" + code.replace("from __future__ import annotations\n", ""), space)
    return next(value for name, value in space.items() if name in ("Pairs", "Orpo") and isinstance(value, type))


def test_the_pairs_of_the_pages_keep_to_everything() -> None:
    settings = {"data.responses": ["answer", "wrong"], "batch.group_size": 2}
    assert failures(written_on("strangers.md"), file="orpo.py", settings=settings) == {}
    found = failures(written_on("tutorial.md"), file="pairs.py", settings=settings)
    assert found == {}


@pytest.mark.parametrize(
    ("plugin", "checks", "saying"),
    [
        (kit_cases.MeanLoss, PACKING, "policy: loss differs"),
        (kit_cases.MeanMetric, PACKING, "policy: size differs"),
        (kit_cases.PlaceInTheBatch, PACKING, "policy: loss differs"),
        (kit_cases.OfItsOwnRank, {"test_data_parallel_ranks_change_no_gradient"}, "policy: loss differs"),
        (kit_cases.MeanOverLength, PACKING | {NOTHING_WRITTEN}, "policy: loss is nan"),  # all have such samples
        (kit_cases.Constant, {"test_something_has_a_gradient"}, "no token of policy has a gradient"),
        (kit_cases.RestoresNothing, {"test_its_state_survives_a_restart"}, "the trainer's state after a step"),
        (kit_cases.TellsNothing, {"test_its_state_survives_a_restart"}, "of the step after a restart differs"),
        (kit_cases.ForgetsOnTheDriver, {"test_its_state_survives_a_restart"}, "the driver's state after a step"),
        (kit_cases.TakesAnyKey, {"test_it_refuses_a_key_it_does_not_know"}, "DID NOT RAISE"),
        (kit_cases.LosesItsTable, {"test_its_table_survives_the_way_to_another_process"}, "pair"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_fails_the_checks_that_name_it(plugin: type, checks: set[str], saying: str) -> None:
    found = failures(plugin)
    assert found.keys() == checks
    assert all(saying in text for text in found.values()), found


@pytest.mark.parametrize(
    ("plugin", "check", "saying"),
    [
        (kit_cases.NanOnEmpty, "test_an_empty_micro_batch_adds_nothing", "the loss of policy is nan"),
        (kit_cases.NanGradientOnEmpty, NOTHING_WRITTEN, "policy: gradient is nan"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_numbers_that_are_not_finite_where_there_is_nothing(plugin: type, check: str, saying: str) -> None:
    """Some ranks of the other checks have nothing either."""
    found = failures(plugin)
    assert saying in found[check] and found.keys() <= PACKING | {check}, found


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (kit_cases.ScoresTooFew, r"plugin kit_cases: miles_score gave 1 scores to the 4 samples of group 0"),
        (kit_cases.ScoresNothing, r"plugin kit_cases: miles_score gave sample 0/0 nan; a finite number, or None"),
        (kit_cases.AnswersATensor, r"plugin kit_cases: miles_loss answered Tensor; return Loss\(sum, per, metrics\)"),
        (kit_cases.AnswersEveryToken, r"plugin kit_cases: miles_loss answered a Loss of shape \[\d+\]; sum it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_answer_of_the_wrong_shape_is_named(plugin: type, message: str) -> None:
    with pytest.raises(Refused, match=message):
        type("Checks", (AlgorithmChecks,), {"plugin": plugin})().case(1).deal(ranks=1, budget=64)
