"""Models beside the policy that cannot work are refused before anything is built."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from miles_core.config import RunConfig
from miles_core.edges.megatron.roles import check_roles
from miles_core.testing import write_tiny
from miles_core.types import Role
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny")) / "model"


@pytest.fixture
def other(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "other")


def said(tiny: Path, role: Role, table=None, keys=None, **placement) -> list[tuple[str, str]]:
    tables = {"algorithm": "mine", "model": {"path": str(tiny)}, "placement": placement}
    found: list[tuple[str, str]] = []
    roles = {"policy": Role(trained=True), "critic": role}
    check_roles(roles, table or {}, RunConfig.model_validate(tables), lambda *complaint: found.append(complaint), keys)
    return found


def critic(folder: Path, **optim) -> Role:
    return Role(trained=True, head="value", path=str(folder), optim=optim)


def test_the_policy_s_own_folder_can_be_a_critic(tiny):
    assert said(tiny, critic(tiny)) == []
    assert said(tiny, Role(trained=True, head="value")) == []


def test_a_head_of_values_has_one_row(tiny, other):
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"score.weight": np.zeros((1, 32), np.float32)}, other / "model.safetensors")
    assert said(tiny, critic(other)) == []
    save_file(weights | {"score.weight": np.zeros((2, 32), np.float32)}, other / "model.safetensors")
    ((key, message),) = said(tiny, critic(other))
    assert key == "mine.critic" and "score.weight has shape [2, 32], not [1, 32]" in message


def test_a_folder_whose_weights_are_another_model_s(tiny, other):
    config = json.loads((other / "config.json").read_text()) | {"hidden_size": 64}
    (other / "config.json").write_text(json.dumps(config))
    assert all(key == "mine.critic" and "not [" in message for key, message in said(tiny, critic(other)))
    assert said(tiny, critic(other))


def test_another_vocabulary_means_other_tokens(tiny, other):
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 99}
    (other / "config.json").write_text(json.dumps(config))
    ((key, message),) = said(tiny, critic(other))
    assert key == "mine.critic" and "a vocabulary of 99, the policy of 14" in message


def test_a_critic_must_fit_the_parallel_sizes(tiny, other):
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 1}
    (other / "config.json").write_text(json.dumps(config))
    found = said(tiny, critic(other), {"pipeline_model_parallel_size": 2}, trainers=2)
    assert any("pipeline_model_parallel_size: 2 does not divide the model's 1 layers" in what for _, what in found)


def test_a_missing_folder(tiny, tmp_path):
    ((key, message),) = said(tiny, Role(path=str(tmp_path / "nowhere")))
    assert key == "mine.critic" and "nowhere is not a folder; point this key at a model" in message
    ((_, message),) = said(tiny, Role(path=str(tmp_path)))
    assert f"{tmp_path} has no config.json; point this key at a model" in message


def test_the_key_is_the_one_that_the_algorithm_took_it_from(tiny, tmp_path):
    keys = {"beta": 0.1, "start": tmp_path / "nowhere", "optimizer": {"lr": -1.0}, "other": None}
    role = critic(tmp_path / "nowhere", lr=-1.0)
    assert {key for key, _ in said(tiny, role, keys=keys.items())} == {"mine.start", "mine.optimizer.lr"}
    assert {key for key, _ in said(tiny, role)} == {"mine.critic", "mine.critic.optim.lr"}


def test_an_optimizer_of_its_own_is_checked_like_the_run_s(tiny):
    assert said(tiny, critic(tiny, lr=1e-3)) == []
    ((key, message),) = said(tiny, critic(tiny, lr=-1.0))
    assert key == "mine.critic.optim.lr" and message == "input should be greater than 0"
    ((key, message),) = said(tiny, critic(tiny, rate=1.0))
    assert key == "mine.critic.optim.rate" and message == "extra inputs are not permitted"


@pytest.mark.parametrize("name", ["policy", "crtic"])
def test_ranks_of_their_own_are_for_a_role_beside_the_policy(tiny, name):
    ((key, message),) = said(tiny, critic(tiny), apart=[name])
    assert key == "placement.apart" and "it has critic" in message
    assert said(tiny, critic(tiny), apart=["critic"]) == []
