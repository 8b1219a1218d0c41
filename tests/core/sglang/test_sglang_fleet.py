"""Weights for several engines, one of which only just starts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from miles_core.edges.protocols import Worker
from miles_core.edges.sglang.client import SGLangClient
from miles_core.loop.fleet import Fleet
from sglang_cases import InProcess, assert_whole, calls, engine, group, live, until, weights

SLOW_S = 3


class Rank:
    """Sends version 1."""

    name = "trainer-0"

    def __init__(self, engines: list[InProcess]) -> None:
        self.engines = engines

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> dict[str, float]:
        assert method == "push"
        await asyncio.gather(*(worker.engine.load(weights(a=1, b=1)) for worker in self.engines))
        return {"time/push": 0.0}


def fleet(workers: list[InProcess]) -> Fleet:
    ranks, rest = cast("list[Worker]", [Rank(workers)]), cast(Any, SimpleNamespace())
    return Fleet(rest, ranks, [], cast("list[Worker]", workers), [], [], {}, False, rest, rest, asked=1)


async def assert_serves(worker: InProcess, version: int) -> None:
    requests = group(0, 2)
    for request, completion in zip(requests, await SGLangClient([worker], 10).generate(requests), strict=True):
        assert_whole(request, completion, [version] * 6)


def test_engines_that_are_well_go_on_until_the_one_that_starts_is(dialect: str) -> None:
    """A server takes a minute or two to start on a GPU; meanwhile the others would write nothing."""

    async def go() -> None:
        well = InProcess("engine-0", engine(dialect))
        await live(well)
        starts = InProcess("engine-1", engine(dialect, "--slow-s", str(SLOW_S)))
        try:
            pushing = asyncio.ensure_future(fleet([well, starts]).push(verify=False))
            for _ in range(3):
                await asyncio.sleep(SLOW_S / 6)
                await assert_serves(well, 0)
            assert not pushing.done() and "/pause_generation" not in await calls(well)
            await until(pushing.done)
            await pushing
            for worker in (well, starts):
                await assert_serves(worker, 1)
        finally:
            await asyncio.gather(*(worker.engine.close() for worker in (well, starts)))

    asyncio.run(go())
