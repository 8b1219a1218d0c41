"""From prompts to a step's groups, above a real ledger and a real queue; what samples is a worker of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from miles_core.config import RunConfig
from miles_core.edges.lasting import Ledger, RunState
from miles_core.edges.queue import queue as module
from miles_core.edges.queue.queue import JournaledQueue
from miles_core.edges.store.folder import RunFolder
from miles_core.loop.rollout import Rolled
from miles_core.loop.rollouts import Rollouts
from miles_core.samples import staleness
from miles_core.testing.threads import Threads
from miles_core.types import Group, Refused, Sample

GROUPS, TOKENS = 2, 500


def sampled(id: int, version: int) -> Group:
    return Group(id, [Sample(tokens=list(range(TOKENS)), versions=[-1] + [version] * (TOKENS - 1), id=f"{id}/0")])


class Sampler:
    """A rollout worker that is done with a group at once, unless the test holds it back."""

    name = "rollout-0"

    def __init__(self, version: Callable[[], int]) -> None:
        self.version, self.held = version, dict[int, asyncio.Event]()
        self.done: asyncio.Queue[Rolled] = asyncio.Queue()
        self.tasks = set[asyncio.Task[None]]()

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method == "collect":
            return [await self.done.get()]
        for group in args[0]:
            self.tasks.add(asyncio.ensure_future(self.sample(group.id, self.version())))

    async def sample(self, id: int, version: int) -> None:
        if held := self.held.pop(id, None):
            await held.wait()
        self.done.put_nowait(Rolled(id, sampled(id, version)))


class Bench:
    """The rollouts of a run, and the trainer's side of them as the driver has it."""

    def __init__(self, run: RunConfig, ledger: Ledger, queue: JournaledQueue) -> None:
        def prompts(split: str, start: int) -> Iterator[Sample]:
            return (Sample(prompt=str(i)) for i in count(start))

        nothing: Callable[..., None] = lambda **_: None  # noqa: E731
        hooks = SimpleNamespace(run=run, prompts=prompts, span=nothing, drop_group=nothing, group_end=nothing,
                                failure=nothing, metrics=lambda **_: {})  # fmt: skip
        self.sampler = Sampler(lambda: self.rollouts.admission.version)
        fleet = SimpleNamespace(rollouts=[self.sampler], heal=self.well, replaced=[])
        self.ledger, self.queue, self.run = ledger, queue, run
        self.rollouts = Rollouts(hooks, fleet, ledger, queue)  # type: ignore[arg-type]
        self.rows: list[dict[str, float]] = []

    async def well(self) -> None:
        pass

    async def turn(self, between: Callable[[int], Awaitable[None]], trains_s: float = 0.0) -> None:
        await self.rollouts.restore(RunState())
        sampling = asyncio.ensure_future(self.rollouts.turn())
        training = asyncio.ensure_future(self.train(between, trains_s))
        try:
            await asyncio.wait([sampling, training], return_when=asyncio.FIRST_COMPLETED)
            for task in (sampling, training):
                if task.done():
                    task.result()
        finally:
            sampling.cancel()
            training.cancel()

    async def train(self, between: Callable[[int], Awaitable[None]], trains_s: float) -> None:
        """No checkpoint ever counts. ``between`` comes when a step's groups were taken, before it begins."""
        ready = asyncio.ensure_future(self.rollouts.take(1))
        for step in range(1, self.run.steps + 1):
            groups, metrics = await ready
            await between(step)
            if step < self.run.steps:
                ready = asyncio.ensure_future(self.rollouts.take(step + 1))
            assert metrics["staleness/max"] == staleness(groups, step)["staleness/max"]
            self.rows.append(metrics)
            await asyncio.sleep(trains_s)
            if self.run.mode != "async" or self.run.rollout.weights == "drain":
                await self.rollouts.rest()
            await self.rollouts.trained(step, groups)
            await self.rollouts.move(step)


@asynccontextmanager
async def bench(
    folder: Path, capacity: int = 1 << 20, said: list[str] | None = None, **keys: Any
) -> AsyncIterator[Bench]:
    run = RunConfig(algorithm="any", model={"path": "model"}, batch={"groups": GROUPS, "group_size": 1}, **keys)  # type: ignore[arg-type]
    store, cluster = RunFolder(folder, 1), Threads()
    queue = JournaledQueue(cluster, folder, 1 << 20, capacity, (said if said is not None else []).append)
    made = Bench(run, store.ledger(print), queue)
    try:
        yield made
    finally:
        await made.rollouts.close()
        await cluster.close()


async def nothing(step: int) -> None:
    pass


@pytest.mark.parametrize("too_old", ["regenerate", "drop"])
def test_what_comes_too_late_goes_into_no_step_though_enough_wait(tmp_path: Path, too_old: str) -> None:
    """Begun with version 0, and back when step 3 is due, which may have nothing older than version 1."""

    async def go() -> None:
        late = asyncio.Event()
        rollout = {"max_staleness": 1, "too_old": too_old}
        async with bench(tmp_path, mode="async", steps=5, rollout=rollout) as made:
            made.sampler.held[1] = late

            async def between(step: int) -> None:
                if step == 2:
                    late.set()
                    while made.ledger.where(1)[0] != "queue" or len(made.rollouts.admission.ripe) < GROUPS:
                        await asyncio.sleep(0.01)

            await asyncio.wait_for(made.turn(between), 30)
            assert [row["staleness/max"] for row in made.rows if row["staleness/max"] > 1] == []
            assert [row["staleness/too_old"] for row in made.rows] == [0, 0, 1, 0, 0]
            assert made.ledger.counts()["trained"] == 5 * GROUPS
            where = made.ledger.where(1)
            assert where == ("dropped", "too old") if too_old == "drop" else where[0] == "trained"

    asyncio.run(go())


MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "overlap": {"mode": "overlap"},
    "async": {"mode": "async", "rollout": {"max_staleness": 3}},
    "async-drain": {"mode": "async", "rollout": {"max_staleness": 3, "weights": "drain"}},
}


@pytest.fixture
def size(tmp_path: Path) -> int:
    """Bytes of a group in the queue, to within a few."""

    async def go() -> int:
        async with bench(tmp_path / "one") as made:
            await made.queue.open()
            await made.queue.put(1, sampled(1, 0))
            return made.queue.used[0]

    (tmp_path / "one").mkdir()
    return asyncio.run(go())


@pytest.mark.parametrize("mode", MODES)
def test_a_queue_with_room_for_one_step_never_hangs(
    tmp_path: Path, size: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint ever frees anything, and weights wait for groups that found the queue full."""
    monkeypatch.setattr(module, "RETRY_S", 0.02)

    async def go() -> list[str]:
        said = list[str]()
        async with bench(tmp_path, GROUPS * size + 100, said, steps=8, **MODES[mode]) as made:
            await asyncio.wait_for(made.turn(nothing, trains_s=0.1), 30)
            assert made.ledger.counts()["trained"] == 8 * GROUPS
            assert (sum(row["time/queue_full"] for row in made.rows) > 0.1) == mode.startswith("async")
        return said

    assert len(asyncio.run(go())) == mode.startswith("async")  # back-pressure, said once


@pytest.mark.parametrize("mode", MODES)
def test_a_queue_too_small_for_a_step_is_refused_and_never_hangs(
    tmp_path: Path, size: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)

    async def go() -> None:
        async with bench(tmp_path, (GROUPS - 1) * size + size // 2, steps=8, **MODES[mode]) as made:
            with pytest.raises(Refused, match=f"takes none before {GROUPS} wait: queue.capacity_mib"):
                await asyncio.wait_for(made.turn(nothing), 30)

    asyncio.run(go())


def test_a_run_that_goes_on_holds_no_more_than_a_few_of_the_groups_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: JournaledQueue, ids: list[int]) -> list[Any]:
        raise AssertionError(f"{len(ids)} groups at once")

    async def go() -> None:
        keys: dict[str, Any] = {"mode": "async", "rollout": {"max_staleness": 9}, "steps": 30}
        async with bench(tmp_path, **keys) as made:
            await made.queue.open()
            for id in range(1, 21):
                made.ledger.lease([id], "rollout-0")
                await made.queue.put(id, sampled(id, id // 5))
                made.ledger.queue([id])
            position = made.ledger.position
            await made.rollouts.sync()
        async with bench(tmp_path, **keys) as made:
            with monkeypatch.context() as patch:
                patch.setattr(JournaledQueue, "get", never)
                await made.rollouts.restore(RunState(step=2, position=position))
            assert made.rollouts.admission.ripe == {id: id // 5 for id in range(1, 15)}  # of no later weights
            assert made.ledger.counts()["queue"] == 14 and made.queue.used[0] > 0
            groups, _ = await made.rollouts.take(3)
            assert groups == [sampled(1, 0), sampled(2, 0)]
            with suppress(LookupError):
                await made.queue.get([20])
                raise AssertionError("what no checkpoint knows was kept")

    asyncio.run(go())


def test_staleness_is_that_of_a_samples_oldest_token() -> None:
    def sample(*versions: int) -> Sample:
        return Sample(tokens=[0] * len(versions), versions=list(versions))

    groups = [Group(1, [sample(-1, 3, 4), sample(-1, 2, 3)]), Group(2, [sample(-1, 3, 4), sample(-1, -1, 3)])]
    assert staleness(groups, 5) == {"staleness/max": 2.0, "staleness/mean": 1.25}  # step 5 starts from version 4
    assert staleness([Group(1, [sample(-1, -1)])], 5)["staleness/max"] == 0.0  # a response that was given
