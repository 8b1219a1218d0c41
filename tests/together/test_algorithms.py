"""Whole runs of PPO, DPO and SFT, from their examples: what they leave, and what must not change a number."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miles_core.testing.runs import INLINE
from safetensors.torch import load_file
from whole_runs import here, in_threads, processes_of, timeless

pytestmark = pytest.mark.slow

REVERSE = Path(__file__).parents[2] / "examples" / "reverse"
SMALL = ("steps=3", "mode=sync", "batch.groups=16", "batch.updates=2", "batch.micro_tokens=64", "eval.every=3",
         "eval.prompts=32", "checkpoint.every=0", 'optim.schedule="constant"', "optim.min_lr=0.0")  # fmt: skip
KL = ("ppo.kl=0.05", "ppo.kl_target=0.02", "ppo.kl_horizon=30", 'ppo.kl_estimator="k2"')
APART = ('placement.apart=["critic"]',)
WITHOUT_ENGINE = ("placement.engines=0", "eval.every=3", "batch.updates=1")


@pytest.fixture(scope="module")
def go(runs, one_ray):
    """``go("ppo", "name", "key=value", ...)``: an example made small; returns the metrics of each step."""
    for name in ("ppo", "dpo", "sft"):
        shutil.copy(REVERSE / f"{name}.toml", runs.folder)

    def go(algorithm, name, *keys, resume=False):
        several = any(key.startswith("placement.trainers") or "apart" in key for key in keys)  # that is, processes
        run = here if several else in_threads
        run(runs.folder / f"{algorithm}.toml", runs.folder / name, *SMALL, *keys, resume=resume)
        return runs.metrics(name)

    return go


@pytest.fixture(scope="module")
def ppo(go):
    """PPO with everything that has a say in a step, on ranks that policy and critic share."""
    return go("ppo", "ppo-shared", *KL, "checkpoint.every=2")


@pytest.fixture(scope="module")
def apart(go):
    """The same with a critic on ranks of its own."""
    return go("ppo", "ppo-apart", *KL, *APART, "checkpoint.every=2")


def alike(one, other, tolerance=1e-4, without=()):
    """The same numbers, but for what a clock or another order of additions writes. From the third step on a rounding
    error of the first can have drawn another token."""
    for mine, theirs in zip(timeless(one)[:3], timeless(other)[:3], strict=True):
        mine, theirs = ({k: v for k, v in row.items() if not k.startswith(without)} for row in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def changed(runs, name):
    before = load_file(runs.folder / "data" / "model" / "model.safetensors")
    after = runs.weights(name)
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_ppo_leaves_what_was_promised(runs, ppo):
    assert [row["step"] for row in ppo] == [0, 1, 2, 3]
    for row in ppo[1:]:
        assert all(math.isfinite(value) for value in row.values())
        assert {"loss", "grad_norm", "lr", "entropy", "kl/ref", "penalty/entropy"} <= row.keys()
        assert {"critic/loss", "critic/grad_norm", "critic/lr", "critic/error", "critic/value/mean"} <= row.keys()
        assert (row["lr"], row["critic/lr"]) == (4e-4, 1e-3)
        assert row["kl/train_rollout"] < 1e-4
    assert ppo[1]["critic/value/mean"] == 0.0 and ppo[-1]["critic/value/mean"] != 0.0  # its head starts at zero
    assert "eval/accuracy" in ppo[0] and "eval/accuracy" in ppo[-1]
    assert changed(runs, "ppo-shared")
    assert not any("score" in name for name in runs.weights("ppo-shared"))  # of the policy; the critic's is beside it
    (state,) = (runs.folder / "ppo-shared/checkpoints/step-000003/policy").glob("state-0.json")
    assert "ppo_beta" in state.read_text()


def test_a_critic_on_ranks_of_its_own_changes_no_number(ppo, apart):
    alike(apart, ppo)


def test_a_critic_on_ranks_of_its_own_is_warmed_up_alike(go):
    one, other = (go("ppo", f"ppo-warm{len(place)}", *KL, *place, "ppo.critic_warmup=1") for place in ((), APART))
    alike(other, one)


def test_two_replicas_take_the_steps_of_one(go, ppo):
    alike(go("ppo", "ppo-two", *KL, "placement.trainers=2"), ppo, without=("critic/clipped",), tolerance=1e-3)


@pytest.mark.parametrize("place", ["shared", "apart"])
def test_a_resumed_run_goes_on_with_the_same_critic_and_weight_of_its_divergence(go, runs, ppo, apart, place):
    whole, keys = {"shared": (ppo, ()), "apart": (apart, APART)}[place]
    keys, straight, name = (*KL, "checkpoint.every=2", *keys), f"ppo-{place}", f"ppo-{place}-resumed"
    shutil.copytree(runs.folder / straight, runs.folder / name)
    shutil.rmtree(runs.folder / name / "checkpoints/step-000003")
    assert timeless(go("ppo", name, *keys, resume=True)) == timeless(whole)
    for role in ("model", "critic"):
        mine, theirs = (load_file(runs.folder / run / role / "model.safetensors") for run in (name, straight))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_trained_critic_is_what_another_run_starts_from(go, runs, ppo):
    weights = load_file(runs.folder / "ppo-shared/critic/model.safetensors")
    assert weights["score.weight"].shape == (1, weights["model.norm.weight"].shape[0])
    assert weights["score.weight"].any()
    again = go("ppo", "ppo-critic-given", *KL, f"ppo.critic={runs.folder}/ppo-shared/critic", "eval.every=0")
    assert ppo[1]["critic/value/mean"] == 0.0 != again[0]["critic/value/mean"]


def test_held_out_data_steers_nothing(go):
    """Responses are given, so the trainer is asked of held-out ones: it looks at their divergence, and forgets it."""
    given = (*KL, "placement.engines=0", 'data.responses=["answer"]', "reward={}", "ppo.entropy=0.0")
    often, never = (go("ppo", f"ppo-eval{n}", *given, f"eval.every={n}") for n in (1, 0))
    assert "eval/loss" in often[0] and len(never) == 3
    weights = [row["kl/weight"] for row in never]
    assert [row["kl/weight"] for row in often[1:]] == weights and len(set(weights)) == 3


def test_a_warm_up_trains_the_critic_and_leaves_the_policy(go):
    """The policy of step 2 is still the reference; without a warm-up it has moved."""
    one, two, three = go("ppo", "ppo-waits", "ppo.kl=0.05", "ppo.critic_warmup=2", "batch.updates=1")[1:]
    for row in (one, two):
        assert "critic/loss" in row and "loss" not in row and "lr" not in row
    assert three["kl/old"] == 0.0 and three["kl/ref"] == pytest.approx(0.0, abs=1e-6) and three["grad_norm"] > 0
    assert three["critic/value/mean"] != 0.0
    moved = go("ppo", "ppo-hurries", "ppo.kl=0.05", "batch.updates=1")[3]
    assert abs(moved["kl/ref"]) > 1e-4


def test_a_second_pass_over_a_step_learns_from_a_policy_that_moved(go):
    once, twice = (go("ppo", f"ppo-epochs{n}", "batch.updates=1", f"batch.epochs={n}")[1] for n in (1, 2))
    assert once["kl/old"] == 0.0 and once["ratio/mean"] == 1.0
    assert twice["kl/old"] > 1e-6  # its mean over both passes
    assert twice["advantage/abs"] == pytest.approx(once["advantage/abs"])  # made once, by the step's first policy
    assert twice["critic/error"] == pytest.approx(once["critic/error"])


@pytest.mark.parametrize(
    ("old", "keys"),
    [("engine", ()), ("both", ()), ("both", ('correction.outside="mask"', 'correction.denominator="token"'))],
    ids=["engine", "both", "kept"],
)
def test_what_the_engine_said_can_stand_in_for_the_policy_or_weigh_it(go, ppo, old, keys):
    """Here both say the same, so nothing but rounding may change; over the weights' own metrics."""
    rows = go("ppo", f"ppo-{old}{len(keys)}", *KL, f"batch.old_logprobs={old}", "eval.every=3", *keys)
    alike(rows, ppo, tolerance=1e-3, without=("correction/", "critic/clipped"))
    if old == "both":
        assert all(row["correction/weight"] == pytest.approx(1.0, abs=1e-3) for row in rows[1:])
        assert all(row["correction/outside"] == 0.0 for row in rows[1:])


def test_a_loss_that_ignores_its_weights_is_refused(runs, go):
    (runs.folder / "careless.py").write_text(
        "from miles_core import Plugin, hookimpl\nfrom miles_core.types import Loss\n\n\nclass Careless(Plugin):\n"
        "    @hookimpl\n    def miles_loss(self, role, batch, output):\n"
        "        return Loss((output.logprobs * batch.mask).sum())\n"
    )
    keys = [
        'algorithm="./careless.py"',
        "steps=1",
        "eval.every=0",
        'batch.old_logprobs="both"',
        f'plugins=["{INLINE}"]',
    ]
    err = runs.run("careless", *(x for key in keys for x in ("--set", key)), expect=2).stderr
    assert "the algorithm's loss ignores batch.weighed" in err and "Traceback" not in err


RAISES = """\
from pathlib import Path

from miles_core import Plugin, hookimpl
from miles_core.formulas.terms import reduce
from miles_core.types import Loss


class Raises(Plugin):
    losses = 0

    @hookimpl
    def miles_loss(self, role, batch, output):
        self.losses += 1  # one micro-batch a step
        if self.losses == 3 and (Path(__file__).parent / "broken").exists():
            raise ZeroDivisionError("of nothing")
        mean = reduce(-batch.columns["advantage"] * output.logprobs, batch, "token", 1)
        return Loss(mean.sum, mean.per)
"""


def test_a_plugin_that_raises_on_a_training_rank_ends_the_run_and_it_goes_on_once_that_is_mended(runs):
    """With real processes, until it goes on."""
    (runs.folder / "raises.py").write_text(RAISES)
    (runs.folder / "broken").write_text("")
    keys = ["steps=4", "eval.every=0", "checkpoint.every=1", "batch.updates=1", "batch.micro_tokens=100000"]
    sets = [arg for key in ('algorithm="./raises.py"', *keys) for arg in ("--set", key)]
    err = runs.run("raised", *sets, expect=2).stderr
    assert "plugin raises: miles_loss raised ZeroDivisionError: of nothing" in err and "Traceback" not in err
    assert "raises.py" in (runs.folder / "raised/error.log").read_text()  # where its author looks
    assert not processes_of(str(runs.folder / "raised"))
    audit = [str(Path(sys.executable).with_name("miles")), "audit", str(runs.folder / "raised")]
    assert subprocess.run(audit, capture_output=True).returncode == 0
    (runs.folder / "broken").unlink()
    out = runs.run("raised", *sets, "--set", f'plugins=["{INLINE}"]', "--resume").stdout
    assert "going on after step " in out  # 2, or 1 where that was still being written
    assert [row["step"] for row in runs.metrics("raised")] == [1, 2, 3, 4]
    told = subprocess.run(audit, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


def test_dpo_learns_from_pairs_without_an_engine(go, runs):
    rows = go("dpo", "dpo", "batch.updates=1")
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    assert rows[0]["eval/accuracy"] == 0.5 and rows[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[-1]["eval/loss"] < math.log(2)
    assert rows[1]["accuracy"] == 0.5 and rows[-1]["pair/margin"] != 0.0
    assert "kl/train_rollout" not in rows[1] and "reward/mean" not in rows[1]  # nobody sampled anything
    assert changed(runs, "dpo") and list((runs.folder / "dpo/reference").glob("*.sqlite"))
    again = go("dpo", "dpo-again", "batch.updates=1", f"dpo.cache={runs.folder / 'dpo/reference'}")
    alike(again, rows)
    assert not (runs.folder / "dpo-again/reference").exists()
    two = go("dpo", "dpo-two", "batch.updates=1", "placement.trainers=2", 'placement.apart=["ref"]', "batch.groups=16")
    alike(two, rows)


def test_dpo_makes_pairs_of_what_an_engine_samples(go):
    online = ("data.responses=[]", "placement.engines=1", "batch.group_size=4", "rollout.max_tokens=5", "dpo.pairs=2")
    rows = go("dpo", "dpo-online", *online, 'reward.positions.kind="positions"', "batch.groups=8", "dpo.sft=0.1")
    for row in rows[1:]:
        assert {"accuracy", "penalty/sft", "reward/mean", "rollout/dropped_groups"} <= row.keys()
        assert row["kl/train_rollout"] < 1e-4
        assert all(math.isfinite(value) for value in row.values())
    assert "eval/accuracy" in rows[0]


def test_sft_learns_with_an_engine_for_the_held_out_prompts_or_without(go, runs):
    sampled = go("sft", "sft", "batch.updates=1")
    assert sampled[-1]["loss"] < sampled[1]["loss"] and "eval/accuracy" in sampled[-1]
    assert "kl/train_rollout" not in sampled[1]
    alone = go("sft", "sft-alone", *WITHOUT_ENGINE, "reward={}")
    assert alone[-1]["eval/loss"] < alone[0]["eval/loss"]
    assert [row["loss"] for row in alone[1:]] == pytest.approx([row["loss"] for row in sampled[1:]], rel=1e-5)
    # five responses, one a micro-batch: of two ranks one has an empty one
    uneven = ("batch.groups=5", "batch.micro_tokens=15")
    one, two = (go("sft", f"sft-{n}", *WITHOUT_ENGINE, *uneven, f"placement.trainers={n}", "reward={}") for n in (1, 2))
    alike(two, one)


def test_what_sft_trained_is_a_warm_start(go, runs):
    greedy = ("eval.temperature=0.0", "eval.prompts=64", "batch.updates=1", "batch.micro_tokens=1024")
    tuned = go("sft", "sft-warm", *greedy, "steps=40", "batch.groups=64", "eval.every=40")
    after = tuned[-1]["eval/accuracy"]
    assert tuned[0]["eval/accuracy"] < 0.1 < 0.3 < after
    warm = go("ppo", "ppo-warm-start", *greedy, f"model.path={runs.folder}/sft-warm/model", "steps=1", "eval.every=1")
    assert warm[0]["eval/accuracy"] == after
