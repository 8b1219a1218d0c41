"""What core answers for every algorithm: the checks of its own tables, and honest numbers of a rollout."""

import math

import pytest
from miles_core.config import RunConfig
from miles_core.edges.default import Default
from miles_core.types import Group, Refused, Sample


def default(**tables) -> Default:
    return Default(Default.Config(), RunConfig(algorithm="a", model={"path": "m"}, **tables))


@pytest.mark.parametrize(
    "tables, key, said",
    [
        ({"batch": {"groups": 8, "updates": 3}}, "batch.updates", "8 groups do not divide into 3 updates; say"),
        ({"optim": {"lr": 1e-4, "min_lr": 1e-3, "schedule": "linear"}}, "optim.min_lr", "is above optim.lr"),
        ({"optim": {"lr": 1e-3, "min_lr": 1e-4}}, "optim.min_lr", "has no effect"),
        ({"batch": {"updates": 4, "epochs": 5}}, "batch.epochs", "5 x 4 updates learns from tokens drawn 19 updates"),
        ({"mode": "overlap", "batch": {"updates": 4, "epochs": 3}}, "batch.epochs", "batch.max_age allows 16"),
    ],
)
def test_what_cannot_work_is_said_with_its_key(tables, key, said):
    found = []
    default(**tables).miles_check(lambda *fault: found.append(fault))
    assert [k for k, _ in found] == [key] and said in found[0][1]


def test_what_works_is_not_complained_of():
    found = []
    default(batch={"groups": 8, "updates": 4}).miles_check(lambda *fault: found.append(fault))
    default(batch={"updates": 4, "epochs": 4}).miles_check(lambda *fault: found.append(fault))
    assert not found


def sample(reward: float, version: int = 3, finish: str = "stop", **info) -> Sample:
    return Sample(tokens=[1, 2, 3], mask=[False, True, True], versions=[-1, version, version + 1], finish=finish,
                  rewards={"mine": reward}, reward=reward, info=info)  # fmt: skip


def test_the_numbers_of_a_rollout_by_hand():
    groups = [Group(1, [sample(0.0), sample(1.0, finish="length")]), Group(2, [sample(0.5), sample(0.5)])]
    numbers = default().miles_metrics(step=5, groups=groups, evaluating=False)
    assert numbers["reward/mean"] == 0.5
    assert numbers["reward/std"] == pytest.approx(math.sqrt(0.125))  # of 0, 1, 0.5, 0.5 as a population
    assert numbers["reward/equal_groups"] == 0.5
    assert numbers["rollout/tokens"] == 8
    assert numbers["rollout/truncated"] == 0.25


def test_accuracy_is_the_unweighted_reward_that_the_run_names():
    groups = [Group(1, [sample(0.25, raw_rewards={"exact": 1.0})]), Group(2, [sample(0.0, raw_rewards={"exact": 0.0})])]
    numbers = default(eval={"accuracy": "exact"}).miles_metrics(step=1, groups=groups, evaluating=True)
    assert numbers == {"eval/mine": 0.125, "eval/exact": 0.5, "eval/accuracy": 0.5}
    with pytest.raises(Refused, match="eval.accuracy = 'other' is none of the rewards given: mine, exact"):
        default(eval={"accuracy": "other"}).miles_metrics(step=1, groups=groups, evaluating=True)


@pytest.mark.parametrize("norm, skipped", [(1.0, False), (math.inf, True), (math.nan, True)])
def test_a_gradient_that_is_not_finite_is_not_stepped_on(norm, skipped):
    assert (default().miles_skip_step(role="policy", step=1, grad_norm=norm) is not None) == skipped


def test_keys_of_the_asynchronous_mode_are_refused_elsewhere():
    def said(**tables):
        found = []
        default(**tables).miles_check(lambda *fault: found.append(fault))
        return found

    keys = {"max_staleness": 3, "too_old": "drop", "weights": "drain"}
    assert said(mode="async", rollout=keys) == []
    assert [key for key, _ in said(mode="overlap", rollout=keys)] == [f"rollout.{key}" for key in keys]
    assert "this is 'sync'" in said(rollout={"too_old": "drop"})[0][1]
    assert said(mode="async", placement={"engines": 0})[0][0] == "mode"
