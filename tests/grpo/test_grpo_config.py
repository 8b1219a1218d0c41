"""The keys of ``[grpo]``: variants are defaults and no more, and what cannot work is refused where it was written."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from grpo_cases import plugin
from miles_core.commands import explain
from miles_core.config import RunConfig
from miles_core.contract import check
from miles_core.edges.toml import Source
from miles_core.testing.runs import write_tiny
from miles_core.types import Column, Role
from miles_plugin_grpo import GRPO
from miles_plugin_grpo.config import VARIANTS

SPELLED_OUT = {
    "grpo": ("grpo", 1e-6, "clip", 0.2, 0.2, "sequence", False, "k3"),
    "dr_grpo": ("dr_grpo", None, "clip", 0.2, 0.2, "constant", False, "k3"),
    "dapo": ("grpo", 1e-6, "clip", 0.2, 0.28, "token", True, "k3"),
    "gspo": ("grpo", 1e-6, "gspo", 3e-4, 4e-4, "sequence", False, "k3"),
    "cispo": ("grpo", 1e-6, "cispo", 1.0, 4.0, "token", False, "k3"),
    "rloo": ("rloo", None, "clip", 0.2, 0.2, "constant", False, "k3"),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", 1e-6, "clip", 0.2, 0.2, "token", False, "k2"),
}
KEYS = ("advantage", "std_eps", "loss", "clip_low", "clip_high", "aggregate", "dynamic_sampling", "kl_estimator")


def test_every_variant_is_spelled_out_here():
    assert set(SPELLED_OUT) == set(VARIANTS)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_is_its_explicit_spelling(variant):
    spelled = {key: value for key, value in zip(KEYS, SPELLED_OUT[variant], strict=True) if value is not None}
    config = GRPO.Config.model_validate({"variant": variant})
    assert config.model_dump(exclude={"variant"}) == GRPO.Config.model_validate(spelled).model_dump(exclude={"variant"})
    assert (config.kl, config.entropy, config.dual_clip, config.dynamic_sampling_reward) == (0.0, 0.0, None, None)
    assert not config.contradictions()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_key_that_is_given_wins_and_leaves_the_others(variant):
    plain = GRPO.Config.model_validate({"variant": variant}).model_dump()
    given = GRPO.Config.model_validate({"variant": variant, "clip_high": 0.7, "aggregate": "constant"}).model_dump()
    assert given == plain | {"clip_high": 0.7, "aggregate": "constant"}
    switched = GRPO.Config.model_validate({"variant": variant, "advantage": "dr_grpo"})
    assert switched.std_eps is None and not switched.contradictions()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_another_process_gets_the_same_keys(variant):
    config = GRPO.Config.model_validate({"variant": variant, "kl": 0.01})
    again = GRPO.Config.model_validate_json(config.model_dump_json())
    assert again == config and not again.contradictions()


@pytest.fixture
def complaints(tmp_path):
    """``complaints(lines of [grpo], group_size)``: what a run with them is told, without the folder's name."""

    def complaints(lines: str, group_size: int = 8) -> list[str]:
        path = tmp_path / "run.toml"
        path.write_text(f'algorithm = "grpo"\nmodel.path = "m"\nbatch.group_size = {group_size}\n[grpo]\n{lines}')
        source = Source([path])
        run = RunConfig.model_validate({k: v for k, v in source.tree.items() if k != "grpo"})
        config = source.validate(GRPO.Config, source.tree["grpo"], ("grpo",))
        if config is not None:
            GRPO(config, run).miles_check(source.complain)
        return [text.replace(str(path), "run.toml") for text in source.complaints]

    return complaints


def test_what_can_work_is_not_complained_of(complaints):
    assert complaints("") == []
    assert complaints('variant = "dapo"\ndynamic_sampling_reward = "correct"\nkl = 0.01\ndual_clip = 3.0') == []
    assert complaints('kl_estimator = "k2"') == []  # with kl = 0, as in the baseline of an ablation


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("\nclip_hi = 0.3", "run.toml:6: grpo.clip_hi: no such key; did you mean 'clip_high'?"),
        ('variant = "drgrpo"', "run.toml:5: grpo.variant: input should be 'grpo', 'dr_grpo', 'dapo', "),
        ('variant = ["dapo"]', "run.toml:5: grpo.variant: input should be 'grpo', "),
        (
            'loss = "ppo"',
            "run.toml:5: grpo.loss: input should be 'clip', 'gspo', 'gspo_token', 'sequence' or 'cispo', got 'ppo'",
        ),
        ("clip_low = 1.5", "run.toml:5: grpo.clip_low: input should be less than or equal to 1, got 1.5"),
        ("clip_high = 0", "run.toml:5: grpo.clip_high: input should be greater than 0, got 0"),
        ("dual_clip = 1.0", "run.toml:5: grpo.dual_clip: input should be greater than 1, got 1.0"),
        ("std_eps = 0.0", "run.toml:5: grpo.std_eps: input should be greater than 0, got 0.0"),
        ("kl = -0.1", "run.toml:5: grpo.kl: input should be greater than or equal to 0, got -0.1"),
        (
            'variant = "dr_grpo"\nstd_eps = 1e-4',
            'run.toml:6: grpo.std_eps: has no effect with advantage = "dr_grpo", which divides by none; remove it',
        ),
        (
            'dual_clip = 3.0\nvariant = "cispo"',
            'run.toml:5: grpo.dual_clip: has no effect with loss = "cispo", whose weight clip_high bounds already; '
            "remove it",
        ),
        (
            'dynamic_sampling_reward = "correct"',
            "run.toml:5: grpo.dynamic_sampling_reward: has no effect without dynamic_sampling = true; "
            "add that or remove this",
        ),
        (
            "dynamic_sampling_range = [0.0, 1.0]",
            "run.toml:5: grpo.dynamic_sampling_range: has no effect without dynamic_sampling = true; ",
        ),
        (
            "dynamic_sampling = true\ndynamic_sampling_range = [1.0, 0.0]",
            "run.toml:6: grpo.dynamic_sampling_range: leaves nothing between its ends; say the lower one first",
        ),
        (
            'variant = "rloo"\nstd = "batch"',
            'run.toml:6: grpo.std: has no effect with advantage = "rloo"; remove it',
        ),
        ("kl_cap = 0.0", "run.toml:5: grpo.kl_cap: input should be greater than 0, got 0.0"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(complaints, lines, complaint):
    (only,) = complaints(lines)
    assert only.startswith(complaint)


def test_a_group_of_one_is_refused(complaints):
    (only,) = complaints("", group_size=1)
    assert only.startswith("run.toml:3: batch.group_size: is 1, but grpo compares samples of one prompt; say 2 or more")
    assert only.endswith('or grpo.alone = "reward"')
    assert complaints('alone = "reward"', group_size=1) == []
    (only,) = complaints('alone = "reward"\ndynamic_sampling = true', group_size=1)
    assert only.startswith("run.toml:6: grpo.dynamic_sampling: would replace every group of one")


def test_an_entropy_bonus_is_refused_where_held_out_data_would_lack_it(complaints):
    """A loss is taken of it, and nothing is sampled."""
    given, held_out = "[placement]\nengines = 0\n", "[eval]\nevery = 2\n"
    (only,) = complaints("entropy = 0.1\n" + given + held_out)
    assert only.startswith(
        "run.toml:5: grpo.entropy: without engines held-out data is told by its log-probabilities alone"
    )
    for lines in ("entropy = 0.1\n" + given, "entropy = 0.1\n" + held_out, given + held_out):
        assert complaints(lines) == []


def test_a_reference_is_built_only_for_a_divergence():
    assert plugin().miles_roles() == {} and plugin().miles_columns() == {}
    assert plugin(kl=0.01).miles_roles() == {"ref": Role(trained=False)}
    assert plugin(kl=0.01).miles_columns() == {"ref_logprobs": Column(role="ref", field="logprobs")}


def test_the_plan_shows_every_key_as_the_file_would_spell_it():
    text = plugin(variant="dapo", kl=0.01).miles_explain()
    assert 'aggregate = "token"\ndynamic_sampling = true' in text["grpo"]
    assert "frozen copy" in text["grpo's reference model"]


def test_explain_tells_a_variant_s_defaults_from_plain_ones_and_from_what_was_written(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "run.toml").write_text(
        'algorithm = "grpo"\nsteps = 1\nmodel.path = "model"\ndata.train = "train.jsonl"\n'
        'reward.positions.weight = 1.0\nrollout.max_tokens = 4\n[grpo]\nvariant = "dr_grpo"\n'
    )
    done = CliRunner().invoke(explain.command, [str(tmp_path / "run.toml"), "--set", "grpo.clip_high=0.3"])
    assert done.exit_code == 0, done.output
    told = dict(line.split(None, 1) for line in done.output.splitlines())
    assert told["grpo.clip_low"].split() == ["0.2", "default"]
    assert told["grpo.aggregate"].split(None, 1) == ["constant", "follows from another key of [grpo]"]
    assert "--set grpo.clip_high=0.3" in told["grpo.clip_high"]


def test_every_hook_is_one_that_miles_calls():
    check("grpo", GRPO)


def test_importing_the_plugin_imports_no_torch():
    code = "import sys, miles_plugin_grpo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
