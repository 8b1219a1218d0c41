from miles_core.testing import AlgorithmChecks
from miles_plugin_kto import Kto


class TestKto(AlgorithmChecks):
    plugin = Kto
    keys = {"undesirable": 0.5}
