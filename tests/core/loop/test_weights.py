"""Who waits for whom: rollouts and steps take turns, or overlap by exactly one step."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.loop.driver import Weights


def turn(steps: int, staleness: int, rollout_s: list[float], train_s: list[float]) -> list[str]:
    """The loop's two coroutines with nothing but their waits; returns what happened, in order."""
    events: list[str] = []

    async def main() -> None:
        weights, ready = Weights(0), asyncio.Queue()

        async def rollouts() -> None:
            for step in range(1, steps + 1):
                await weights.reach(step - 1 - staleness)
                events.append(f"roll {step} at {weights.version}")
                await asyncio.sleep(rollout_s[step - 1])
                ready.put_nowait(step)
            weights.rest()

        async def work() -> None:
            for step in range(1, steps + 1):
                assert await ready.get() == step
                events.append(f"train {step} at {weights.version}")
                await asyncio.sleep(train_s[step - 1])
                await weights.resting.wait()
                events.append(f"push {step}")
                weights.move(step)

        # A wait without end fails here, once; shrinking it would take minutes.
        await asyncio.wait_for(asyncio.gather(rollouts(), work()), 2)

    asyncio.run(main())
    return events


times = st.lists(st.sampled_from([0.0, 0.0005, 0.002]), min_size=5, max_size=5)


@settings(max_examples=25, deadline=None)
@given(times, times)
def test_in_turns_every_rollout_has_the_newest_weights(rollout_s, train_s):
    events = turn(5, 0, rollout_s, train_s)
    assert events == [e for n in range(1, 6) for e in (f"roll {n} at {n - 1}", f"train {n} at {n - 1}", f"push {n}")]


@settings(max_examples=25, deadline=None)
@given(times, times)
def test_overlapped_every_rollout_is_one_version_behind_whoever_is_slower(rollout_s, train_s):
    events = turn(5, 1, rollout_s, train_s)
    rolls = [e for e in events if e.startswith("roll")]
    assert rolls == ["roll 1 at 0", "roll 2 at 0", "roll 3 at 1", "roll 4 at 2", "roll 5 at 3"]
    for step in range(1, 5):  # what is sampled when weights move is known exactly
        assert events.index(f"roll {step + 1} at {max(step - 1, 0)}") < events.index(f"push {step}")


@pytest.mark.parametrize("staleness", [0, 1])
def test_one_step_is_a_run_too(staleness):
    assert turn(1, staleness, [0.0], [0.0]) == ["roll 1 at 0", "train 1 at 0", "push 1"]
