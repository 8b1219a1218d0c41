"""Advantages, and which groups are worth having one."""

import statistics

import pytest
import torch
from grpo_cases import examples, plugin
from hypothesis import given
from hypothesis import strategies as st
from miles_core.types import Group, Refused, Sample

numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
groups_of_rewards = st.lists(
    st.lists(st.tuples(numbers, st.integers(1, 9)), min_size=1, max_size=8), min_size=1, max_size=6
)


def group(rewards, lengths=None, id=0):
    lengths = lengths or [1] * len(rewards)
    samples = [Sample(reward=r, mask=[False, *[True] * n]) for r, n in zip(rewards, lengths, strict=True)]
    return Group(id, samples)


def built(data):
    return [group([r for r, _ in rows], [n for _, n in rows], i) for i, rows in enumerate(data)]


def test_numbers_worked_out_by_hand():
    groups = [group([1.0, 0.0, 0.0, 0.0]), group([3.0, 5.0])]
    # means 1/4 and 4; unbiased deviations sqrt(((3/4)^2 + 3 (1/4)^2) / 3) = 1/2 and sqrt(2)
    grpo = plugin(advantage="grpo", std_eps=1e-12).miles_score(groups)
    assert grpo == [pytest.approx([1.5, -0.5, -0.5, -0.5]), pytest.approx([-(0.5**0.5), 0.5**0.5])]
    assert plugin(advantage="dr_grpo").miles_score(groups) == [[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0]]
    rloo = plugin(advantage="rloo").miles_score(groups)
    assert rloo == [pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3]), [-2.0, 2.0]]


def test_the_epsilon_is_added_to_the_deviation():
    assert plugin().miles_score([group([0.0, 1.0])])[0] == pytest.approx(
        [-0.5 / (0.5**0.5 + 1e-6), 0.5 / (0.5**0.5 + 1e-6)], rel=1e-12
    )
    halved = plugin(std_eps=0.5**0.5).miles_score([group([0.0, 1.0])])[0]
    assert halved == pytest.approx([-0.25 * 2**0.5, 0.25 * 2**0.5])


@examples
@given(groups_of_rewards)
def test_grpo_is_the_standard_score_within_the_group(data):
    for rows, scores in zip(data, plugin(std_eps=1e-4).miles_score(built(data)), strict=True):
        rewards = [r for r, _ in rows]
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        expected = [(r - statistics.mean(rewards)) / (spread + 1e-4) for r in rewards]
        assert scores == pytest.approx(expected, rel=1e-9, abs=1e-9)


@examples
@given(groups_of_rewards)
def test_rloo_compares_with_the_mean_of_the_others(data):
    for rows, scores in zip(data, plugin(advantage="rloo").miles_score(built(data)), strict=True):
        rewards = [r for r, _ in rows]
        for i, score in enumerate(scores):
            others = rewards[:i] + rewards[i + 1 :]
            expected = rewards[i] - statistics.mean(others) if others else 0.0
            assert score == pytest.approx(expected, rel=1e-9, abs=1e-9)


@examples
@given(groups_of_rewards)
def test_the_reinforce_pp_baseline_is_whitened_over_every_token_of_the_step(data):
    scores = plugin(advantage="reinforce_pp_baseline", std_eps=1e-6).miles_score(built(data))
    per_token = []  # every token of the step carries its sample's centered reward
    for rows in data:
        mean = statistics.mean(r for r, _ in rows)
        per_token += [r - mean for r, n in rows for _ in range(n)]
    x = torch.tensor(per_token, dtype=torch.float64)
    spread = x.std() if len(x) > 1 else torch.zeros(())
    expected = (x - x.mean()) / (spread + 1e-6)
    flat = [
        score
        for rows, scored in zip(data, scores, strict=True)
        for (_, n), score in zip(rows, scored, strict=True)
        for _ in range(n)
    ]
    assert flat == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
class TestEveryAdvantage:
    @examples
    @given(data=groups_of_rewards)
    def test_has_the_shape_of_the_groups(self, advantage, data):
        assert [len(scores) for scores in plugin(advantage=advantage).miles_score(built(data))] == list(map(len, data))

    @pytest.mark.parametrize("reward", [0.0, 0.1, -7.3, 1e6])
    def test_is_nothing_where_all_did_the_same(self, advantage, reward):
        scores = plugin(advantage=advantage).miles_score([group([reward] * 7), group([reward] * 3)])
        assert [x for row in scores for x in row] == pytest.approx([0.0] * 10, abs=1e-3 if reward == 1e6 else 1e-9)

    def test_is_nothing_in_a_group_of_one(self, advantage):
        assert plugin(advantage=advantage).miles_score([group([3.0]), group([-2.0])]) == [[0.0], [0.0]]

    def test_is_the_reward_in_a_group_of_one_where_the_key_says_so(self, advantage):
        scores = plugin(advantage=advantage, alone="reward").miles_score([group([3.0]), group([-2.0]), group([1.0])])
        expected = [3.0, -2.0, 1.0]
        if advantage == "reinforce_pp_baseline":  # which whitens what the others leave
            expected = [(x - 2 / 3) / statistics.stdev(expected) for x in expected]
        assert [row for (row,) in scores] == pytest.approx(expected, rel=1e-5)

    @examples
    @given(data=groups_of_rewards, shift=st.integers(-5, 5))
    def test_ignores_a_constant_added_to_a_group(self, advantage, data, shift):
        grpo = plugin(
            advantage=advantage, **({"std_eps": 1e-2} if advantage in ("grpo", "reinforce_pp_baseline") else {})
        )
        moved = [[(r + shift, n) for r, n in data[0]], *data[1:]]
        for before, after in zip(grpo.miles_score(built(data)), grpo.miles_score(built(moved)), strict=True):
            assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


@examples
@given(groups_of_rewards)
def test_the_deviation_of_the_batch_is_that_of_all_rewards(data):
    rewards = [r for rows in data for r, _ in rows]
    spread = (statistics.stdev(rewards) if len(rewards) > 1 else 0.0) + 1e-4
    for rows, scores in zip(data, plugin(std="batch", std_eps=1e-4).miles_score(built(data)), strict=True):
        mean = statistics.mean(r for r, _ in rows)
        assert scores == pytest.approx([(r - mean) / spread for r, _ in rows], rel=1e-9, abs=1e-9)


def test_dynamic_sampling_drops_groups_that_teach_nothing():
    dapo = plugin(variant="dapo")
    assert dapo.miles_drop_group(group([1.0, 1.0, 1.0])) == "every reward is 1"
    assert dapo.miles_drop_group(group([0.0, 0.0])) == "every reward is 0"
    assert dapo.miles_drop_group(group([0.1 + 0.2, 0.3])) == "every reward is 0.3"  # equal but for rounding
    assert dapo.miles_drop_group(group([1.0, 0.0, 0.0])) is None
    assert dapo.miles_drop_group(group([0.5, 0.51])) is None
    assert plugin(variant="grpo").miles_drop_group(group([1.0, 1.0])) is None


def test_dynamic_sampling_in_a_range_drops_what_is_too_easy_or_too_hard_too():
    dapo = plugin(variant="dapo", dynamic_sampling_range=(0.2, 0.9))
    assert dapo.miles_drop_group(group([1.0, 0.0, 0.0, 0.0])) is None
    assert dapo.miles_drop_group(group([1.0, *[0.0] * 4])) == "the mean reward is 0.2, not between 0.2 and 0.9"
    assert dapo.miles_drop_group(group([*[1.0] * 19, 0.0])) == "the mean reward is 0.95, not between 0.2 and 0.9"
    assert dapo.miles_drop_group(group([0.5, 0.5])) == "every reward is 0.5"  # OpenRLHF would keep it, to learn nothing


def test_dynamic_sampling_can_look_at_one_reward_of_several():
    dapo = plugin(variant="dapo", dynamic_sampling_reward="correct")
    wrong = Group(7, [Sample(reward=-0.1 * i, rewards={"correct": 0.0, "length": -0.1 * i}) for i in range(4)])
    assert dapo.miles_drop_group(wrong) == "every correct is 0"
    assert plugin(variant="dapo").miles_drop_group(wrong) is None
    wrong.samples[2].rewards["correct"] = 1.0
    assert dapo.miles_drop_group(wrong) is None
    with pytest.raises(Refused, match=r"'corect' is none of the rewards given: correct, length"):
        plugin(variant="dapo", dynamic_sampling_reward="corect").miles_drop_group(wrong)
