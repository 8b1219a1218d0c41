"""A server on GPUs that trainers use too: who has the memory when, and what the server forgets on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from miles_core.edges.protocols import EngineError
from miles_core.edges.sglang.client import SGLangClient
from sglang_cases import assert_whole, calls, engines, group, push, weights


def test_in_turns_the_memory_is_the_trainers_from_sleep_to_the_first_bucket(dialect: str) -> None:
    opened, closed = (["/begin_weight_update"], ["/end_weight_update"]) if dialect == "0.5.23" else ([], [])
    stops = ["/pause_generation"] if opened else ["/v1/loads", "/pause_generation", "/v1/loads"]

    async def go() -> None:
        async with engines(dialect, turns=True) as [worker]:
            client = SGLangClient([worker], 10)
            assert await worker.engine.ready() == f"SGLang {dialect}"
            for version in (1, 2):
                before = len(await calls(worker))
                began, _ = await asyncio.gather(worker.engine.sleep(), worker.engine.begin_update(version))
                assert began
                released = await calls(worker)
                assert released[before:] == [*stops, "/flush_cache", "/release_memory_occupation"]
                await asyncio.gather(worker.engine.load(weights(a=version)), worker.engine.load(weights(b=version)))
                await worker.engine.end_update()
                assert (await calls(worker))[len(released) :] == [
                    "/resume_memory_occupation",
                    *opened,
                    "/update_weights_from_tensor",
                    "/update_weights_from_tensor",
                    *closed,
                    "/resume_memory_occupation",
                    "/continue_generation",
                ]
                [request] = group(version, 1)
                assert_whole(request, (await client.generate([request]))[0], [version] * 6)
            assert not worker.engine._restarts

    asyncio.run(go())


MEMORY = {"/release_memory_occupation", "/resume_memory_occupation"}


def test_in_turns_memory_is_kept_where_both_fit(dialect: str) -> None:
    """``room`` is what training left: with the server asleep it must hold all of it, and awake nothing more."""
    gib = 2**30
    rooms = {1: (8 * gib - 1, False), 2: (8 * gib, True), 3: (0, True), 4: (-1, False), 5: (8 * gib, True)}
    slept = {1: True, 2: True, 3: False, 4: False, 5: True, 6: False}  # by what was said in the update before

    async def go() -> None:
        async with engines(dialect, "--cache-gib", "6", turns=True) as [worker]:
            client = SGLangClient([worker], 10)
            assert (
                await worker.engine.ready() == f"SGLang {dialect}: 2.0 GB of weights, 6.0 GB of cache for 1,000 tokens"
            )
            for version, sleeps in slept.items():
                [request] = group(1, 1)  # the prompt of the versions before, which must have been forgotten
                before = len(await calls(worker))
                assert await worker.engine.sleep() is sleeps
                asked = (await calls(worker))[before:]
                if not sleeps:  # it goes on serving while ranks train
                    assert not asked
                    assert_whole(request, (await client.generate([request]))[0], [version - 1] * 6)
                await worker.engine.begin_update(version)
                begun = (await calls(worker))[before:]
                assert begun.count("/flush_cache") == sleeps  # else the first bucket has it forget
                room, stays = rooms.get(version, (0, True))
                told, _ = await asyncio.gather(worker.engine.stay(room), worker.engine.load(weights(a=version)))
                assert told is stays
                await worker.engine.load(weights(b=version))
                await worker.engine.end_update()
                asked = (await calls(worker))[before:]
                assert [path in asked for path in MEMORY] == [sleeps, sleeps] and asked.count("/flush_cache") == sleeps
                assert asked[-1] == "/continue_generation"
                assert_whole(request, (await client.generate([request]))[0], [version] * 6)

    asyncio.run(go())


@pytest.mark.parametrize("options", [{"turns": True, "may_stay": False}, {"turns": True, "silent": True}, {}])
def test_memory_is_not_kept_where_that_was_not_allowed_or_nothing_is_known_or_nobody_shares_it(
    dialect: str, options: dict[str, bool]
) -> None:
    async def go() -> None:
        more: dict[str, Any] = {key: value for key, value in options.items() if key != "silent"}
        async with engines(dialect, *(() if "silent" in options else ("--cache-gib", "6")), **more) as [worker]:
            await worker.engine.begin_update(1)
            assert await worker.engine.stay(2**40) is False

    asyncio.run(go())


def test_in_turns_a_server_without_its_weights_is_replaced(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect, turns=True) as [worker]:
            await worker.engine.begin_update(1)
            await worker.engine.abort_update()
            assert worker.engine._restarts == 1
            await worker.engine.ready()
            with pytest.raises(EngineError, match="serves nothing until whole weights arrive"):
                await worker.engine.address()
            await push(worker, 1)
            [request] = group(0, 1)
            assert_whole(request, (await SGLangClient([worker], 10).generate([request]))[0], [1] * 6)

    asyncio.run(go())
