"""The kit's checks on every way in which the algorithms put their parts together."""

from collections.abc import Callable

import pytest
from miles_core.testing import AlgorithmChecks, Finished, LayoutChecks
from miles_plugin_dpo import DPO
from miles_plugin_dpo.sft import SFT

PAIRS = {"data.responses": ["answer", "wrong"], "batch.group_size": 2, "placement.engines": 0}


class TestGivenPairs(AlgorithmChecks):
    plugin = DPO
    settings = PAIRS


class TestPairsOfAttempts(AlgorithmChecks):
    plugin = DPO
    keys = {"pairs": 2, "sft": 0.1}


class TestChosenTokens(AlgorithmChecks):
    plugin = DPO
    keys = {"sft": 0.1, "sft_mean": "token"}
    settings = PAIRS


class TestWithoutReference(AlgorithmChecks):
    plugin = DPO
    keys = {"loss": "simpo", "beta": 2.0}
    settings = PAIRS


class TestSquared(AlgorithmChecks):
    plugin = DPO
    keys = {"loss": "ipo", "ipo_length": "average"}
    settings = PAIRS


class TestDemonstrations(AlgorithmChecks):
    plugin = SFT
    settings = {"data.responses": ["answer"], "batch.group_size": 1}


class TestDemonstrationsWithoutAnEngine(AlgorithmChecks):
    plugin = SFT
    keys = {"aggregate": "sequence"}
    settings = {"data.responses": ["answer"], "batch.group_size": 1, "placement.engines": 0}


class TensorChecks(LayoutChecks):
    """Two replicas take the steps of one in tests/together/test_algorithms.py, by all their metrics."""

    @pytest.mark.parametrize("layout", ["tensor"])
    def test_two_ranks_take_the_steps_of_one(self, layout: str, miles_run: Callable[..., Finished]) -> None:
        super().test_two_ranks_take_the_steps_of_one(layout, miles_run)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestPairsOnSeveralRanks(TensorChecks):
    plugin = DPO
    settings = PAIRS


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
class TestDemonstrationsOnSeveralRanks(TensorChecks):
    plugin = SFT
    settings = {"data.responses": ["answer"], "batch.group_size": 1, "placement.engines": 0}
