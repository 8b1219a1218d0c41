"""How many groups may be under way: never so many that one would be too old, always enough to go on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.pacing import Admission, moved, times

sizes = st.integers(1, 5)


def turn(admission: Admission, seed: int, drops: float) -> list[tuple[int, int, int]]:
    """A run in which rollouts and the trainer move in an order drawn at random.

    Returns a row a group that was trained on: its step, and the versions at which it was begun and came back.
    """
    draw = random.Random(seed)
    flying: list[int] = []
    came: dict[int, tuple[int, int]] = {}
    id = 0
    trained: list[tuple[int, int, int]] = []
    while admission.version < admission.steps:
        moves = ["fly"] * (admission.room > 0) + ["land"] * bool(flying)
        if admission.due(admission.version + 1) and (admission.streaming or admission.rests):
            moves.append("train")
        assert moves, f"nothing can go on: {admission}"
        match draw.choice(moves):
            case "fly":
                flying += [admission.version] * admission.room
            case "land":
                begun, id = flying.pop(draw.randrange(len(flying))), id + 1
                if draw.random() >= drops:
                    came[id] = begun, admission.version
                    admission.land(id, begun)
            case "train":
                step = admission.version + 1
                admission.weed(step)
                if taken := admission.pick(step):
                    trained += [(step, *came[id]) for id in taken]
                    admission.version += 1
        admission.flying = len(flying)
    assert not (flying and not admission.streaming)
    return trained


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.integers(0, 3), st.integers(), st.sampled_from([0.0, 0.4]))
def test_streaming_goes_on_and_never_admits_more_than_staleness_allows(groups, steps, staleness, seed, drops):
    admission = Admission(groups, steps, staleness, streaming=True)
    trained = turn(admission, seed, drops)
    assert len(trained) == groups * steps == len({i for i, _ in enumerate(trained)})
    assert admission.used <= groups * steps
    assert all(0 <= step - 1 - begun <= staleness for step, begun, back in trained)
    if not staleness:
        assert all(step - 1 == begun == back for step, begun, back in trained)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.integers(0, 1), st.integers(), st.sampled_from([0.0, 0.4]))
def test_in_turns_and_overlapped_a_step_has_the_weights_that_its_mode_promises(groups, steps, staleness, seed, drops):
    trained = turn(Admission(groups, steps, staleness, streaming=False), seed, drops)
    assert len(trained) == groups * steps
    assert all(begun == back == max(step - 1 - staleness, 0) for step, begun, back in trained)


def test_while_weights_are_awaited_nothing_is_begun():
    admission = Admission(4, 9, 2, streaming=True, flying=3)
    assert admission.room == 9 and not admission.rests
    admission.draining = True
    assert admission.room == 0 and not admission.rests
    admission.flying = 0
    assert admission.rests


def test_waves_add_up_in_turns_and_are_averaged_where_they_overlap():
    waves = [(1.0, 1.5), (3.0, 4.5)]

    def seconds(streaming, waves):
        told = Admission(4, 9, 2, streaming).sampling(waves)
        return told["time/sample"], told["time/reward"]

    assert seconds(False, waves) == (4.0, 2.0)
    assert seconds(True, waves) == (2.0, 1.0)
    assert seconds(True, []) == (0.0, 0.0)


def test_what_was_under_way_is_measured_over_time():
    now = [100.0]
    admission = Admission(4, 9, 2, streaming=True, clock=lambda: now[0])
    for seconds, groups in ((1.0, 8), (2.0, 2), (1.0, 0)):  # as many are under way from then on
        now[0] += seconds
        admission.fly(groups)
    now[0] += 4.0
    told = admission.sampling([])
    assert told["utilization/in_flight"] == (2.0 * 8 + 1.0 * 2) / 8.0
    assert told["utilization/rollouts"] == 3.0 / 8.0 and told["utilization/queued"] == 0.0
    now[0] += 1.0
    admission.land(7, 0)
    assert admission.sampling([])["utilization/queued"] == 1.0
    now[0] += 1.0
    assert admission.sampling([])["utilization/rollouts"] == 0.0


def test_the_parts_of_a_step_add_up_to_its_wall_time():
    metrics = {"time/train": 3.0, "time/sync": 0.5, "time/sample": 1.5, "time/reward": 0.25, "rollout/tokens": 60.0}
    spent = times(metrics, waited=2.0, wall=6.0, ahead=0.0, turns=True)
    assert spent["tokens_per_s"] == 10.0
    parts = sum(metrics[f"time/{part}"] for part in ("train", "sync", "sample", "reward"))
    assert parts + spent["time/other"] == pytest.approx(6.0)
    overlapped = times(metrics, waited=2.0, wall=6.0, ahead=1.0, turns=False)
    assert 3.0 + 0.5 + 2.0 + overlapped["time/other"] - 1.0 == pytest.approx(6.0)


def test_engines_say_how_busy_they_were_and_those_that_do_not_count_for_nothing():
    assert moved([{"bytes": 3.0}, {}], [0.25, None, 0.75]) == {"sync/bytes": 3.0, "utilization/engines": 0.5}
    assert moved([{}], [None]) == moved([], []) == {"sync/bytes": 0.0}
