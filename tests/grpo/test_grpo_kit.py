"""The kit's checks on every way in which the algorithm puts its parts together."""

import pytest
from miles_core.testing import AlgorithmChecks, LayoutChecks
from miles_plugin_grpo import GRPO


class TestDefaults(AlgorithmChecks):
    plugin = GRPO


class TestConstantAggregate(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "dr_grpo", "kl": 0.02, "entropy": 0.01}


class TestDapo(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "dapo", "dual_clip": 3.0, "dynamic_sampling": False}


class TestGspo(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "gspo"}


class TestByToken(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "gspo", "loss": "gspo_token", "std": "batch", "kl": 0.02, "kl_unbiased": True, "kl_cap": 10.0}


class TestWholeSequences(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "rloo", "loss": "sequence", "aggregate": "sequence"}


class TestCispo(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "cispo", "kl": 0.02, "kl_estimator": "k2"}


class TestWhitened(AlgorithmChecks):
    plugin = GRPO
    keys = {"variant": "reinforce_pp_baseline"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestOnSeveralRanks(LayoutChecks):
    plugin = GRPO
    keys = {"variant": "reinforce_pp_baseline"}  # whitens over the tokens of all ranks
