"""The keys of ``[dpo]``: what cannot work is refused where it was written."""

import subprocess
import sys

import pytest
from dpo_cases import complaints, plugin, run
from miles_core.contract import check
from miles_core.types import Column, Role
from miles_plugin_dpo import DPO
from miles_plugin_dpo.sft import SFT
from pydantic import ValidationError

PAIR = ("chosen", "rejected")
ONLINE = {"batch": {"group_size": 4}}


@pytest.mark.parametrize(
    "keys",
    [{}, {"label_smoothing": 0.1}, {"loss": "robust"}, {"loss": "robust", "label_smoothing": 0.1},
     {"loss": "exo_pair", "label_smoothing": 0.001}, {"loss": "simpo", "margin": 0.0}, {"loss": "hinge"},
     {"loss": "ipo", "ipo_length": "average"}],
    ids=str,
)  # fmt: skip
def test_what_can_work_is_not_complained_of(keys):
    assert complaints(plugin(**keys), PAIR) == complaints(plugin(tables=ONLINE, pairs=2, **keys), ()) == []


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing", 'has no effect with loss = "ipo"'),
        ({"loss": "exo_pair"}, "dpo.label_smoothing", "takes the logarithm of it, so it must be above 0"),
        ({"margin": 0.5}, "dpo.margin", 'has no effect with loss = "sigmoid"'),
        ({"ipo_length": "sum"}, "dpo.ipo_length", 'has no effect with loss = "sigmoid"'),
        ({"pairs": 1}, "dpo.pairs", "has no effect beside data.responses"),
        ({"sft_mean": "token"}, "dpo.sft_mean", "has no effect with sft = 0"),
    ],
)
def test_what_cannot_work_is_said_with_its_key(keys, key, said):
    ((found, message),) = complaints(plugin(**keys), PAIR)
    assert found == key and said in message


@pytest.mark.parametrize("cls", [DPO, SFT])
def test_weights_of_a_policy_gradient_are_refused_before_anything_starts(cls):
    tables = {"batch": {"group_size": 2, "old_logprobs": "both"}}
    ((key, said),) = complaints(cls(cls.Config(), run(**tables)), PAIR)
    assert key == "batch.old_logprobs" and '"both" weighs the terms of a policy gradient' in said


@pytest.mark.parametrize("responses", [["chosen"], ["chosen", "rejected", "worse"]])
def test_the_data_gives_two_responses_no_more_no_less(responses):
    ((key, said),) = complaints(plugin(), responses)
    assert key == "data.responses" and f"names {len(responses)} columns; dpo takes two" in said


def test_attempts_are_enough_for_the_pairs_made_of_them():
    ((key, said),) = complaints(plugin(tables=ONLINE, pairs=3), ())
    assert key == "dpo.pairs" and "take 6 attempts; batch.group_size is 4" in said
    assert [key for key, _ in complaints(plugin(tables={"batch": {"group_size": 1}}), ())] == ["dpo.pairs"]


def test_a_loss_without_a_reference_refuses_one(tmp_path):
    ((key, said),) = complaints(plugin(loss="simpo", reference=str(tmp_path)), PAIR)
    assert key == "dpo.reference" and 'loss = "simpo" has no reference' in said


@pytest.mark.parametrize("key, value", [("beta", 0.0), ("label_smoothing", 0.5), ("sft", -1.0), ("pairs", 0)])
def test_a_value_out_of_range_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        DPO.Config.model_validate({key: value})


def test_the_reference_is_kept_in_the_run_s_folder_or_where_the_key_says(tmp_path):
    assert plugin().miles_roles() == {"ref": Role()}  # no folder is known before the run has one
    inside = plugin(tables={"run_dir": str(tmp_path)})
    assert inside.miles_roles() == {"ref": Role(cache=str(tmp_path / "reference"))}
    own = plugin(tables={"run_dir": str(tmp_path)}, cache=str(tmp_path / "kept"), reference=str(tmp_path))
    assert own.miles_roles() == {"ref": Role(path=str(tmp_path), cache=str(tmp_path / "kept"))}
    assert own.miles_columns() == {"ref_logprobs": Column(role="ref")}
    simpo = plugin(loss="simpo", tables={"run_dir": str(tmp_path)})
    assert simpo.miles_roles() == simpo.miles_columns() == {}


def test_the_plan_shows_every_key_that_has_a_value():
    said = plugin(loss="simpo", margin=0.7).miles_explain()["dpo"]
    assert 'loss = "simpo"' in said and "margin = 0.7" in said and "ipo_length" not in said


@pytest.mark.parametrize("cls", [DPO, SFT])
def test_every_hook_is_one_that_miles_calls(cls):
    check("dpo", cls)


@pytest.mark.parametrize("module", ["miles_plugin_dpo", "miles_plugin_dpo.sft"])
def test_importing_the_plugin_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
