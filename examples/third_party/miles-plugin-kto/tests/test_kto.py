from miles_core.testing import AlgorithmChecks
from miles_plugin_kto import Kto


class TestSampled(AlgorithmChecks):
    plugin = Kto
    keys = {"undesirable": 0.5}


class TestGiven(AlgorithmChecks):
    """As run.toml has it: the data holds the answers, and an engine is there for evaluation only."""

    plugin = Kto
    settings = {"data.responses": ["answer", "wrong"], "batch.group_size": 2}
