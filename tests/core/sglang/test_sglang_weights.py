"""Weights are served whole or not at all; what is in flight meanwhile; what else an engine does with its server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from miles_core.edges.protocols import EngineError, TransportError
from miles_core.edges.sglang import server, wire
from miles_core.edges.sglang.client import KeepingClient, SGLangClient
from sglang_cases import InProcess, assert_whole, calls, engines, fault, group, live, push, until, weights

LONG = 200  # tokens


def both(version: int) -> wire.Tensors:
    return weights(a=version, b=version)


async def running(worker: InProcess, n: int) -> None:
    """Wait until ``n`` requests have some tokens."""
    async with asyncio.timeout(30):
        while (await worker.engine.health())["running"] != n:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.03)


# -- an update -------------------------------------------------------------------------------------------------------


def test_an_update_is_one_version_and_nothing_in_between(dialect: str) -> None:
    """Its first bucket has the server forget: by ``/flush_cache`` it would give the buckets' memory back each time."""
    opened, closed = (["/begin_weight_update"], ["/end_weight_update"]) if dialect == "0.5.23" else ([], [])
    stops = ["/pause_generation"] if opened else ["/v1/loads", "/pause_generation", "/v1/loads"]

    async def go() -> None:
        async with engines(dialect) as [worker]:
            await live(worker)
            before = len(await calls(worker))
            await push(worker, 5)
            assert (await calls(worker))[before:] == [
                *stops,
                *opened,
                "/update_weights_from_tensor",
                "/update_weights_from_tensor",
                *closed,
                "/continue_generation",
            ]
            [request] = group(0, 1)
            [completion] = await SGLangClient([worker], 10).generate([request])
            assert_whole(request, completion, [5] * 6)

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["decoding", "not started"])
def test_requests_in_flight_go_on_with_the_new_weights(dialect: str, mode: str) -> None:
    """The tokens of the old version are kept, none is written twice, and none by what the old weights computed."""

    async def go() -> None:
        async with engines(dialect) as [worker]:
            client, requests = SGLangClient([worker], 10), group(0, 3, tokens=LONG) + group(1, 2, tokens=LONG)
            asking = asyncio.ensure_future(client.generate(requests))
            await running(worker, 5)
            await worker.engine.begin_update(4)
            assert "an abort that looks again in a second" not in await calls(worker)
            late = asyncio.ensure_future(client.generate(group(2, 1)))
            await worker.engine.load(weights(a=4))
            await asyncio.sleep(0.05)
            assert not asking.done() and not late.done()
            await worker.engine.load(weights(b=4))
            await worker.engine.end_update()
            for request, completion in zip(requests, await asking, strict=True):
                assert_whole(request, completion)
                assert completion.finish == "length" and set(completion.versions) == {0, 4}
                assert completion.versions == sorted(completion.versions) and len(completion.tokens) == LONG
            assert_whole(group(2, 1)[0], (await late)[0], [4] * 6)

    async def unborn() -> None:
        async with engines(dialect) as [worker]:
            await live(worker)
            await worker.engine.pause()
            asking = asyncio.ensure_future(SGLangClient([worker], 10).generate(group(0, 2)))
            await asyncio.sleep(0.2)
            await push(worker, 4)
            await asyncio.sleep(0.2)
            assert not asking.done()  # still paused
            await worker.engine.resume()
            for request, completion in zip(group(0, 2), await asking, strict=True):
                assert_whole(request, completion, [4] * 6)

    asyncio.run(go() if mode == "decoding" else unborn())


@pytest.mark.parametrize("n", [1, 40])
def test_a_request_that_slips_past_the_last_look_goes_on_with_the_new_weights(
    dialect: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came when nothing was in flight, and before the server had been told to stop."""

    async def go() -> None:
        async with engines(dialect, keeps=True) as [worker]:
            client, repeat, late = KeepingClient([worker], 10), (await live(worker)).call.repeat, []

            async def slips(path: str, body: Any = None, timeout: float = 10) -> Any:
                if path == "/pause_generation" and not late:
                    late.append(asyncio.ensure_future(client.generate(group(0, n, tokens=LONG))))
                    await running(worker, n)
                return await repeat(path, body, timeout)

            monkeypatch.setattr((await live(worker)).call, "repeat", slips)
            await worker.engine.begin_update(3)
            assert "an abort that looks again in a second" not in await calls(worker)
            await worker.engine.load(both(3))
            await worker.engine.end_update()
            for request, completion in zip(group(0, n, tokens=LONG), await late[0], strict=True):
                assert_whole(request, completion)
                assert set(completion.versions) == {0, 3} and len(completion.tokens) == LONG

    asyncio.run(go())


def test_an_update_comes_through_while_the_engine_is_paused(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            [request] = group(0, 1, tokens=LONG)
            asking = asyncio.ensure_future(SGLangClient([worker], 10).generate([request]))
            await running(worker, 1)
            await worker.engine.pause()
            await push(worker, 1)
            await asyncio.sleep(0.2)
            assert not asking.done()
            await worker.engine.resume()
            [completion] = await asking
            assert_whole(request, completion)
            assert set(completion.versions) == {0, 1} and len(completion.tokens) == LONG

    asyncio.run(go())


@pytest.mark.parametrize("faults", [{"fail_load": "say"}, {"fail_load": "say", "soft": True}, {"fail_load": "die"}])
def test_a_failed_update_is_never_served(dialect: str, faults: dict[str, Any]) -> None:
    """Whether the server says no with status 400, with 200 and success false, or dies of it."""

    async def go() -> None:
        async with engines(dialect, n=2) as [worker, other]:
            await asyncio.gather(push(worker, 1), push(other, 1))
            client, request = SGLangClient([worker], 10), group(0, 1)[0]
            await client.generate([request])
            first = await worker.engine.address()
            await worker.engine.begin_update(1)
            await fault(worker, **faults)
            waiting = asyncio.ensure_future(client.generate([request]))  # in the server, behind the update
            await asyncio.sleep(0.05)
            with pytest.raises(TransportError, match="the SGLang server did not load a bucket: /update_weights_from"):
                await worker.engine.load(both(2))
            async with asyncio.timeout(2):  # the driver gives it 5 s
                await worker.engine.abort_update()
            with pytest.raises(EngineError, match="serves nothing until whole weights arrive"):
                await worker.engine.address()
            assert worker.engine._restarts == 1 and not waiting.done()
            await push(worker, 2)  # waits for the successor
            assert await worker.engine.address() != first
            assert_whole(request, (await waiting)[0], [2] * 6)
            assert_whole(request, (await client.generate([request]))[0], [2] * 6)

    asyncio.run(go())


def test_a_cut_update_of_the_first_weights_is_not_served_as_version_0_either(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.begin_update(1)
            await worker.engine.load(weights(a=1))
            await worker.engine.abort_update()
            await live(worker)
            with pytest.raises(EngineError, match="an update of its weights was cut short; its successor serves"):
                await worker.engine.address()

    asyncio.run(go())


def test_an_update_that_changed_nothing_costs_no_restart(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            client, request = SGLangClient([worker], 10), group(0, 1)[0]
            await live(worker)
            await worker.engine.begin_update(1)
            asking = asyncio.ensure_future(client.generate([request]))
            await asyncio.sleep(0.1)
            await worker.engine.abort_update()
            assert_whole(request, (await asking)[0], [0] * 6)
            await push(worker, 1)  # no session is left open
            assert_whole(request, (await client.generate([request]))[0], [1] * 6)
            assert not worker.engine._restarts
            await worker.engine.abort_update()  # of nothing

    asyncio.run(go())


def test_buckets_given_at_once_are_loaded_one_by_one_in_their_order(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.begin_update(2)
            values = [9, 3, 8, 1, 7, 2]  # the last one counts
            await asyncio.gather(*(worker.engine.load(both(value)) for value in values))
            await worker.engine.end_update()
            assert_whole(group(0, 1)[0], (await SGLangClient([worker], 10).generate(group(0, 1)))[0], [2] * 6)
            assert set((await worker.engine.checksums()).values()) == {f"{2:016x}"}

    asyncio.run(go())


def test_a_bucket_that_waited_for_one_that_failed_is_in_no_later_update(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.begin_update(1)
            await fault(worker, fail_load="die")
            loads = [asyncio.ensure_future(worker.engine.load(weights(a=version))) for version in (1, 2)]
            with pytest.raises(TransportError, match="did not load a bucket: /update_weights_from_tensor"):
                await loads[0]
            await worker.engine.abort_update()
            with pytest.raises(TransportError, match="did not load a bucket"):
                await loads[1]
            await push(worker, 3)
            assert_whole(group(0, 1)[0], (await SGLangClient([worker], 10).generate(group(0, 1)))[0], [3] * 6)

    asyncio.run(go())


def test_an_update_may_begin_twice(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.begin_update(1)
            await worker.engine.load(weights(a=1))
            await push(worker, 2)
            assert_whole(group(0, 1)[0], (await SGLangClient([worker], 10).generate(group(0, 1)))[0], [2] * 6)

    asyncio.run(go())


def test_a_server_that_dies_in_an_update_is_replaced_once(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.begin_update(1)
            (await live(worker)).process.stop()
            await until(lambda: worker.engine._restarts)
            with pytest.raises(TransportError, match="the server was replaced in the middle of the update"):
                await worker.engine.load(weights(a=1))
            await worker.engine.abort_update()
            await push(worker, 1)
            assert worker.engine._restarts == 1 and (await worker.engine.health())["version"] == 1

    asyncio.run(go())


def test_calls_out_of_order_are_refused(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            with pytest.raises(TransportError, match="weights arrived outside an update; call begin_update first"):
                await worker.engine.load(both(1))
            with pytest.raises(TransportError, match="end_update without begin_update"):
                await worker.engine.end_update()
            await worker.engine.begin_update(1)
            with pytest.raises(TransportError, match="no weights arrived"):
                await worker.engine.end_update()

    asyncio.run(go())


# -- requests that are stopped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
def test_aborted_requests_come_back_with_the_tokens_they_have(dialect: str, paused: bool) -> None:
    async def go() -> None:
        async with engines(dialect, "--context-length", "10000") as [worker]:
            client, requests = SGLangClient([worker], 20), group(1, 11, tokens=2000)  # 1/1 begins the name of 1/10
            await client.generate(group(0, 1))
            asking = []
            for request in requests:  # in calls of their own: a call comes back when all of it is done
                asking.append(asyncio.ensure_future(client.generate([request])))
                await asyncio.sleep(0.01)
            await running(worker, 11)
            if paused:
                await worker.engine.pause()
            await worker.engine.abort(["1/1", "no such"])
            async with asyncio.timeout(2):
                [completion] = await asking[1]
            assert completion.finish == "abort" and 0 < len(completion.tokens) < 2000
            assert_whole(requests[1], completion, [0] * len(completion.tokens))
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in (*asking[:1], *asking[2:]))
            await worker.engine.abort(None)
            for request, task in zip(requests, asking, strict=True):
                [completion] = await task
                assert_whole(request, completion)
                assert completion.finish == "abort"

    asyncio.run(go())


def test_a_paused_engine_writes_no_token(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            client, requests = SGLangClient([worker], 10), group(0, 4, tokens=LONG)
            asking = asyncio.ensure_future(client.generate(requests))
            await running(worker, 4)
            await worker.engine.pause()
            late = asyncio.ensure_future(client.generate(group(1, 1)))  # is taken all the same
            await asyncio.sleep(0.4)
            assert not asking.done() and not late.done()
            await worker.engine.resume()
            for request, completion in zip([*requests, *group(1, 1)], [*await asking, *await late], strict=True):
                assert_whole(request, completion, [0] * request.sampling.max_tokens)

    asyncio.run(go())


def test_a_successor_of_a_paused_server_is_paused() -> None:
    async def go() -> None:
        async with engines("0.5.16") as [worker]:
            first = await live(worker)
            await worker.engine.pause()
            first.process.stop()
            await until(lambda: worker.engine._restarts)
            asking = asyncio.ensure_future(SGLangClient([worker], 10).generate(group(0, 1)))
            await live(worker)
            await asyncio.sleep(0.3)
            assert not asking.done()
            await worker.engine.resume()
            assert_whole(group(0, 1)[0], (await asking)[0], [0] * 6)

    asyncio.run(go())


# -- groups, memory, checksums ---------------------------------------------------------------------------------------


def test_memory_is_released_between_rollouts_only(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        server, "FORGET", "/flush_cache?timeout=0.2"
    )  # the server ends itself when it is asked while it works

    async def go() -> None:
        async with engines(dialect) as [worker]:
            client, [request] = SGLangClient([worker], 10), group(0, 1, tokens=400)
            asking = asyncio.ensure_future(client.generate([request]))
            await running(worker, 1)
            with pytest.raises(EngineError, match="Timed out waiting for idle state"):
                await worker.engine.release(["kv_cache"])
            assert_whole(request, (await asking)[0], [0] * 400)
            await worker.engine.release(["kv_cache", "weights"])
            await worker.engine.restore(["weights"])
            await push(worker, 1)
            await worker.engine.restore(["kv_cache"])
            assert_whole(group(1, 1)[0], (await client.generate(group(1, 1)))[0], [1] * 6)
            assert not worker.engine._restarts

    asyncio.run(go())
