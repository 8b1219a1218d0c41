"""What is wrong with a model beside the policy is said once, at the key that a user wrote."""

import pytest
from miles_core.edges.toml import ConfigError, Source
from miles_core.edges.toml.assemble import assemble
from miles_core.testing.runs import write_tiny

PAIRS = ['data.responses=["answer", "wrong"]', "batch.group_size=2", "placement.engines=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data"))


def refused(data, algorithm, *keys):
    """The complaints, without where the key was written."""
    keys = [f'algorithm="{algorithm}"', f'model.path="{data}/model"', f'data.train="{data}/train.jsonl"', *keys]
    with pytest.raises(ConfigError) as caught:
        assemble(Source([], [*keys, "reward.positions.weight=1.0", "rollout.max_tokens=4"]))
    return [line.split(": ", 1)[1] for line in str(caught.value).splitlines()]


def test_a_reference_that_is_no_folder(data):
    (said,) = refused(data, "dpo", *PAIRS, 'dpo.reference="/nowhere/at/all"')
    assert said == "dpo.reference: /nowhere/at/all is not a folder; point this key at a model in Hugging Face format"


def test_a_critic_that_is_no_model(data):
    (said,) = refused(data, "ppo", f'ppo.critic="{data}"')
    assert said.startswith(f"ppo.critic: {data} has no config.json; point this key at a model")


def test_an_optimizer_of_the_critic_s_own(data):
    (said,) = refused(data, "ppo", "ppo.critic_optim={ lr = -1.0 }")
    assert said == "ppo.critic_optim.lr: input should be greater than 0"
    (said,) = refused(data, "ppo", "ppo.critic_optim={ rate = 1.0 }")
    assert said.startswith("ppo.critic_optim.rate: ")


def test_weights_that_a_loss_would_ignore_are_refused_by_the_plan(data):
    """The loop would notice on the first step, after every process was started."""
    (said,) = refused(data, "dpo", 'batch.old_logprobs="both"')
    assert said.startswith('batch.old_logprobs: "both" weighs the terms of a policy gradient, and dpo has none')
