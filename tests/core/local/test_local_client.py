"""One object in front of several engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from miles_core.edges.local.client import LocalClient, StreamingClient
from miles_core.edges.local.server import LocalEngine
from miles_core.edges.protocols import Completion, EngineError, Request, Sampling, WorkerDied


class InProcess:
    """A worker whose engine lives in this process, and which notes what it is asked."""

    def __init__(self, name: str, engine: LocalEngine) -> None:
        self.name, self.engine = name, engine
        self.asked: list[list[str]] = []
        self.timeouts: list[float | None] = []
        self.dead = False

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        self.asked.append([request.id for request in args[0]])
        self.timeouts.append(timeout)
        if self.dead:
            raise WorkerDied("gone")
        return await getattr(self.engine, method)(*args)

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        raise NotImplementedError

    async def kill(self) -> None:
        self.dead = True


@pytest.fixture
def workers(tiny: Any) -> list[InProcess]:
    folder: Path = tiny("qwen3").folder
    return [InProcess(f"engine-{i}", LocalEngine(str(folder), None, 16, 64)) for i in range(2)]


def group(g: int, n: int, tokens: int = 6) -> list[Request]:
    return [Request(f"{g}/{i}", [1 + g, 2, 3], Sampling(tokens), seed=100 * g + i) for i in range(n)]


async def all_of(client: LocalClient, groups: list[list[Request]]) -> list[list[Completion]]:
    return await asyncio.gather(*(client.generate(requests) for requests in groups))


def test_calls_of_one_tick_become_one_call_in_order(workers: list[InProcess], tiny: Any) -> None:
    client, groups = LocalClient(workers[:1], 30.0), [group(g, 3) for g in range(4)]
    answers = asyncio.run(all_of(client, groups))
    assert workers[0].asked == [[request.id for requests in groups for request in requests]]
    assert workers[0].timeouts == [30.0]
    fresh = LocalEngine(str(tiny("qwen3").folder), None, 16, 64)
    alone = asyncio.run(fresh.generate([request for requests in groups for request in requests]))
    assert [completion for completions in answers for completion in completions] == alone


def test_streaming_a_short_group_does_not_wait_for_a_long_one(workers: list[InProcess]) -> None:
    async def written(client: LocalClient) -> int:
        """Tokens in all when a short group is answered beside a long one."""
        before = workers[0].engine._batch.generated
        long = asyncio.ensure_future(client.generate(group(0, 2, tokens=50)))
        await client.generate(group(1, 2, tokens=4))
        found = workers[0].engine._batch.generated - before
        assert [len(completion.tokens) for completion in await long] == [50, 50]
        return found

    assert asyncio.run(written(LocalClient(workers[:1], 30.0))) == 108
    assert asyncio.run(written(StreamingClient(workers[:1], 30.0))) < 60


def test_groups_stay_together_on_the_engine_with_the_fewest_requests(workers: list[InProcess]) -> None:
    client = LocalClient(workers, 30.0)
    answers = asyncio.run(all_of(client, [group(0, 5), group(1, 2), group(2, 2), group(3, 2), group(4, 1)]))
    # 5 | 2, then 2 | 2 + 2, then 5 | 6: a tie at no moment; group 4 goes to the first
    assert [sorted({id.split("/")[0] for id in ids}) for w in workers for ids in w.asked] == [
        ["0", "4"],
        ["1", "2", "3"],
    ]
    assert [len(completions) for completions in answers] == [5, 2, 2, 2, 1]


def test_load_counts_what_is_still_in_flight(workers: list[InProcess]) -> None:
    client = LocalClient(workers, 30.0)

    async def go() -> None:
        long = asyncio.ensure_future(client.generate(group(0, 2, tokens=50)))
        while not workers[0].asked:
            await asyncio.sleep(0)
        await client.generate(group(1, 1))
        assert [len(w.asked) for w in workers] == [1, 1]
        await long
        await client.generate(group(2, 1))  # a tie again: the first engine
        assert [len(w.asked) for w in workers] == [2, 1]

    asyncio.run(go())


def test_a_dead_engine_fails_its_groups_and_no_other(workers: list[InProcess]) -> None:
    client = LocalClient(workers, 30.0)
    workers[1].dead = True

    async def go() -> list[Any]:
        calls = [client.generate(group(g, 2)) for g in range(2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad = asyncio.run(go())
    assert len(good) == 2
    assert isinstance(bad, EngineError) and str(bad) == "engine-1 did not answer 2 requests: gone"
    assert client._load == [0, 0]


def test_what_an_engine_refuses_reaches_its_caller(workers: list[InProcess]) -> None:
    client = LocalClient(workers[:1], 30.0)
    with pytest.raises(EngineError, match="request 9/0: no prompt tokens"):
        asyncio.run(client.generate([Request("9/0", [], Sampling(3), seed=0)]))


def test_a_caller_that_gives_up_does_not_disturb_the_others(workers: list[InProcess]) -> None:
    client = LocalClient(workers[:1], 30.0)

    async def go() -> list[Completion]:
        first, second = (asyncio.ensure_future(client.generate(group(g, 2))) for g in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert [len(c.tokens) for c in asyncio.run(go())] == [6, 6]


def test_nothing_asked_is_nothing_answered(workers: list[InProcess]) -> None:
    assert asyncio.run(LocalClient(workers, 30.0).generate([])) == []
    assert [w.asked for w in workers] == [[], []]
