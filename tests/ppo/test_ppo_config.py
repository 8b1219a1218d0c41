"""The keys of ``[ppo]``, and the models and columns that a run gets by them."""

import subprocess
import sys

import pytest
from miles_core.contract import check
from miles_core.types import Column, Role
from miles_plugin_ppo import PPO
from ppo_cases import plugin
from pydantic import ValidationError

VALUES = {"values": Column(role="critic", field="values")}
REF, START = {"ref_logprobs": Column(role="ref")}, {"start_logprobs": Column(role="policy")}

HELD_OUT = {"placement": {"engines": 0}, "eval": {"every": 2}}  # a loss is taken of it, and nothing is sampled


def complaints(run=None, **keys):
    found = []
    plugin(run=run, **keys).miles_check(lambda *fault: found.append(fault))
    return found


def test_what_can_work_is_not_complained_of():
    assert complaints() == complaints(kl=0.1, kl_target=0.1, dual_clip=3.0) == []
    assert complaints(kl=0.1, kl_in="loss", kl_estimator="k2") == []
    assert complaints(kl=0.1, kl_in="loss", kl_unbiased=True) == []  # then k1 has a gradient
    assert complaints(kl=0.1, kl_target=0.1, kl_mean="sequence", kl_cap=10.0) == []
    assert complaints(kl_estimator="k1", kl_in="loss") == []  # with kl = 0, as in the baseline of an ablation
    assert complaints(run={"steps": 6}, critic_warmup=5) == []
    assert complaints(entropy=0.1, run={"placement": {"engines": 0}}) == complaints(run=HELD_OUT) == []
    assert complaints(entropy=0.1, run={"eval": {"every": 2}}) == []


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"kl_target": 0.1}, "ppo.kl_target", "has no effect with kl = 0; say where the weight starts"),
        ({"kl_mean": "token"}, "ppo.kl_mean", "has no effect without kl_target"),
        ({"kl": 0.1, "kl_unbiased": True}, "ppo.kl_unbiased", "has no effect on a reward, whose ratio is 1"),
        ({"kl": 0.1, "kl_in": "loss"}, "ppo.kl_estimator", "has no gradient on average as a loss"),
        ({"entropy": 0.1, "run": HELD_OUT}, "ppo.entropy", "told by its log-probabilities alone"),
        ({"critic_warmup": 6, "run": {"steps": 6}}, "ppo.critic_warmup", "6 steps of 6 leave none to the policy"),
    ],
)
def test_what_cannot_work_is_said_with_its_key(keys, key, said):
    ((found, message),) = complaints(**keys)
    assert found == key and said in message


@pytest.mark.parametrize(
    "key, value",
    [("gamma", 1.1), ("lam", -0.1), ("gaps", "drop"), ("whiten_eps", 0.0), ("clip_low", 1.5), ("dual_clip", 1.0),
     ("value_clip", -0.1), ("value_coef", 0.0), ("kl", -0.1), ("kl_target", 0.0), ("critic_warmup", -1)],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        PPO.Config.model_validate({key: value})


@pytest.mark.parametrize("old", ["recomputed", "engine", "both"])
@pytest.mark.parametrize("target", [None, 0.1])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_models_and_columns_follow_from_the_divergence_and_who_says_the_old_logprobs(kl_in, target, old):
    run = {"batch": {"old_logprobs": old}}
    plain = plugin(run=run, kl_in=kl_in)
    assert plain.miles_columns() == VALUES and plain.miles_roles().keys() == {"policy", "critic"}
    referenced = plugin(run=run, kl_in=kl_in, kl=0.1, kl_target=target, kl_estimator="k2")
    assert referenced.miles_roles()["ref"] == Role(trained=False)
    # rewards and controller look at the policy of the step's start, which an engine may already have said; a penalty
    # with a weight that stays looks at nobody's but the policy's that learns
    early = old != "engine" and (kl_in == "reward" or target is not None)
    assert referenced.miles_columns() == VALUES | REF | (START if early else {})


def test_the_critic_has_its_own_folder_optimizer_and_head_and_the_policy_waits_for_it(tmp_path):
    roles = plugin(critic=str(tmp_path), critic_optim={"lr": 1e-3}, critic_warmup=2).miles_roles()
    assert roles["critic"] == Role(trained=True, head="value", path=str(tmp_path), optim={"lr": 1e-3})
    assert roles["policy"] == Role(trained=True, start=3)
    assert plugin().miles_roles()["critic"].path is None


def test_the_plan_says_where_the_critic_is_and_what_it_starts_from(tmp_path):
    said = plugin(kl=0.1).miles_explain()
    assert 'gaps = "skip"' in said["ppo"] and "dual_clip" not in said["ppo"]
    assert said["ppo's critic"] == "on the policy's ranks, started from the policy's weights and a head of zeros"
    apart = plugin(run={"placement": {"apart": ["critic"]}}, critic=str(tmp_path)).miles_explain()
    assert apart["ppo's critic"] == f"on ranks of its own, started from {tmp_path}"


def test_every_hook_is_one_that_miles_calls():
    check("ppo", PPO)


def test_importing_the_plugin_imports_no_torch():
    code = "import sys, miles_plugin_ppo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
