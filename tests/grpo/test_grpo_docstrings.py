"""The examples in docstrings are what the code says, and every formula of the plugin has one."""

import doctest
import inspect

import miles_core.formulas.terms
import pytest
from miles_plugin_grpo import advantages, losses

MODULES = [miles_core.formulas.terms, advantages, losses]
NOT_A_FORMULA = {"bounded", "scores", "policy_loss", "penalties", "metrics", "reference_divergence"}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_examples_are_true(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_formula_has_one(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and name not in NOT_A_FORMULA:
            assert "By hand" in (function.__doc__ or "") or ">>>" in (function.__doc__ or ""), name
