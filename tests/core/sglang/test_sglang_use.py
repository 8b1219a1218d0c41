"""In how much of the time an engine had requests running."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from miles_core.edges.protocols import EngineError
from miles_core.edges.sglang import use
from miles_core.edges.sglang.client import SGLangClient
from sglang_cases import engines, group, push, until, weights


def test_an_update_tells_in_what_share_of_the_time_before_it_requests_were_running(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect, "--step-s", "0.02") as [worker]:
            await push(worker, 1)
            await SGLangClient([worker], 30).generate(group(0, 1, tokens=150))
            await until(lambda: not worker.engine._use._running)
            await worker.engine.begin_update(2)
            await worker.engine.load(weights(a=2, b=2))
            assert 0.1 < await worker.engine.end_update() < 0.99
            await worker.engine.begin_update(3)
            await worker.engine.load(weights(a=3, b=3))
            assert await worker.engine.end_update() == 0.0

    asyncio.run(go())


def test_what_a_look_finds_counts_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, found = [10.0], [2, None, 1, 0, 3]
    monkeypatch.setattr(use, "monotonic", lambda: now[0])

    class Server:
        async def get(self, path: str, timeout: float) -> Any:
            assert path == "/v1/loads"
            if (running := found.pop(0)) is None:
                raise EngineError("no answer in time")
            return {"loads": [{"num_running_reqs": running, "num_waiting_reqs": 5}]}

    async def look(load: use.Use, seconds: float) -> None:
        now[0] += seconds
        await load.look(Server())  # type: ignore[arg-type]

    async def go() -> None:
        load = use.Use()
        for seconds in (1.0, 1.0, 2.0, 4.0, 1.0):  # the second look, without an answer, leaves its time to the third
            await look(load, seconds)
        now[0] += 1.0
        load.halt()  # as busy as it was found last
        now[0] += 2.0  # an update
        assert load.share() == (1.0 + 3.0 + 1.0 + 1.0) / 12.0
        assert load.share() == 0.0

    asyncio.run(go())
