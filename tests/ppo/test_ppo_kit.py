"""The kit's checks on every way in which the algorithm puts its parts together."""

from collections.abc import Callable
from typing import Any

import pytest
from miles_core import hookimpl
from miles_core.testing import AlgorithmChecks, Finished, LayoutChecks
from miles_plugin_ppo import PPO


class TestDefaults(AlgorithmChecks):
    plugin = PPO
    settings = {"batch.group_size": 1}


class TestDivergenceInTheReward(AlgorithmChecks):
    plugin = PPO
    keys = {"kl": 0.05, "kl_target": 0.02, "gaps": "discount", "dual_clip": 3.0, "whiten_variance": "biased"}


class TestDivergenceOfSequences(AlgorithmChecks):
    plugin = PPO
    keys = {"kl": 0.05, "kl_in": "loss", "kl_unbiased": True, "kl_cap": 10.0, "kl_target": 0.02, "kl_mean": "sequence"}


class TestDivergenceInTheLoss(AlgorithmChecks):
    plugin = PPO
    keys = {"kl": 0.05, "kl_in": "loss", "kl_estimator": "k3", "aggregate": "sequence", "value_clip": 0}


@pytest.mark.slow
class TestOnSeveralRanks(LayoutChecks):
    """Two replicas take the steps of one in tests/together/test_algorithms.py, by all their metrics."""

    plugin = PPO
    keys = {"kl": 0.05, "kl_target": 0.02}

    @pytest.mark.parametrize("layout", ["tensor"])
    def test_two_ranks_take_the_steps_of_one(self, layout: str, miles_run: Callable[..., Finished]) -> None:
        super().test_two_ranks_take_the_steps_of_one(layout, miles_run)


def test_a_controller_that_does_not_come_back_is_found() -> None:
    class Forgets(PPO):
        @hookimpl
        def miles_restore(self, state: dict[str, Any]) -> None:
            pass

    class Checks(AlgorithmChecks):
        plugin = Forgets
        keys = {"kl": 0.05, "kl_target": 0.02}

    with pytest.raises(AssertionError, match="the trainer's state after a step is not what miles_restore brings back"):
        Checks().test_its_state_survives_a_restart()
