"""The kit's checks on every way in which the algorithm puts its parts together."""

from miles_core.testing import AlgorithmChecks
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
