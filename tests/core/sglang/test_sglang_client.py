"""One object in front of several servers: no request is lost or counted twice, whatever happens to a server."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from miles_core.edges.protocols import Completion, EngineError, Request, Sampling
from miles_core.edges.sglang import client as client_module
from miles_core.edges.sglang import wire
from miles_core.edges.sglang.client import SGLangClient, StreamingClient
from sglang_cases import InProcess, assert_whole, calls, engines, fault, group, live, push, until
from sglang_model import token_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.05)


async def all_of(client: SGLangClient, groups: list[list[Request]]) -> list[list[Completion]]:
    return await asyncio.gather(*(client.generate(requests) for requests in groups))


def assert_all_whole(groups: list[list[Request]], answers: list[list[Completion]], version: int = 0) -> None:
    for requests, completions in zip(groups, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            assert completion.finish == "length"
            assert_whole(request, completion, [version] * request.sampling.max_tokens)


async def up(workers: list[InProcess], client: SGLangClient) -> None:
    """Every engine in service."""
    await asyncio.gather(*map(live, workers))
    client._router.choose("", 0)
    await client._router.wait(10)
    await until(lambda: all(route.up for route in client._router.routes))


# -- when all is well ------------------------------------------------------------------------------------------------


def test_calls_of_one_tick_become_few_calls(dialect: str) -> None:
    groups = [group(g, 24) for g in range(6)]

    async def go() -> None:
        async with engines(dialect) as [worker]:
            client = SGLangClient([worker], 10)
            assert_all_whole(groups, await all_of(client, groups))
            assert (await calls(worker)).count("/generate") == 3  # of 48 each: a group is never torn
            assert await client.generate([]) == []

    asyncio.run(go())


def test_a_straggler_holds_its_own_group_only(dialect: str) -> None:
    """Asked in one tick, by the client of asynchronous runs; a rollout that asks sample by sample has each at once."""

    async def go() -> None:
        async with engines(dialect, "--step-s", "0.01") as [worker]:
            client = StreamingClient([worker], 30)
            slow = [*group(0, 3), *group(0, 1, tokens=400)]
            slow[3] = replace(slow[3], id="0/3")
            groups = [slow, *(group(g, 4) for g in range(1, 6)), *([r] for r in group(6, 2)), group(7, 1, tokens=400)]
            tasks = [asyncio.ensure_future(client.generate(requests)) for requests in groups]
            answers = await asyncio.gather(*tasks[1:-1])
            assert not tasks[0].done() and not tasks[-1].done()
            assert_all_whole(groups[1:-1], answers)
            assert (await calls(worker)).count("/generate") == len(groups)
            assert_all_whole([slow, groups[-1]], await asyncio.gather(tasks[0], tasks[-1]))

    asyncio.run(go())


def test_groups_stay_together_on_the_engine_with_the_fewest_requests() -> None:
    async def go() -> None:
        async with engines("0.5.16", n=2) as workers:
            client = SGLangClient(workers, 10)
            await up(workers, client)
            router, (first, second) = client._router, client._router.routes
            assert [router.choose(g, n) for g, n in (("0", 5), ("1", 2), ("2", 2), ("3", 2), ("4", 1))] == [
                first,
                second,
                second,
                second,
                first,
            ]
            router.done(second, 6)
            assert router.choose("0", 8) is first  # where its prefix is
            assert router.choose("5", 1) is second
            router.out(first, first.address, "a test")
            assert router.choose("0", 1) is second and router.choose("6", 1) is second
            await router.wait(10)
            await until(lambda: first.up)  # asked again, and well
            assert router.choose("7", 1) is second and router.choose("0", 1) is second  # it moved

    asyncio.run(go())


def test_requests_are_asked_for_as_they_are(dialect: str) -> None:
    prompt = [4, 5]
    second = token_of([*prompt, token_of(prompt, 0)], 0)
    cases = [
        Request("stop", prompt, Sampling(9, stop_tokens=(second,)), 1),
        Request("greedy", prompt, Sampling(3, temperature=0.0), 2),
        Request("warm", prompt, Sampling(3, temperature=0.5), 3),
        Request("none", prompt, Sampling(0), 4),
        Request("cut", prompt, Sampling(3, top_p=0.9, top_k=30), 5),
        Request("cut too", prompt, Sampling(3, top_k=20), 6),
    ]

    async def go() -> None:
        async with engines(dialect) as [worker]:
            answers = await SGLangClient([worker], 10).generate(cases)
            finishes = [answer.finish for answer in answers]
            assert finishes == ["stop", "length", "length", "length", "length", "length"]
            assert [len(answer.tokens) for answer in answers] == [2, 3, 3, 0, 3, 3]
            for case, answer in zip(cases[:4], answers[:4], strict=True):
                assert_whole(case, answer, [0] * len(answer.tokens))
            for answer in answers[4:]:  # under the distribution that was drawn from, which is another one here
                assert answer.logprobs == [value / 2 * 0.5 for value in answers[2].logprobs]

    asyncio.run(go())


def test_the_same_name_twice_at_once_is_answered_twice(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            clients = [SGLangClient([worker], 10) for _ in range(2)]  # two rollout workers
            groups = [group(0, 3, tokens=100), group(0, 3, tokens=100)]
            answers = await asyncio.gather(
                *(client.generate(requests) for client, requests in zip(clients, groups, strict=True))
            )
            assert_all_whole(groups, answers)
            twice = [*group(1, 1), *group(1, 1)]
            assert_all_whole([twice], [await clients[0].generate(twice)])

    asyncio.run(go())


# -- when weights are updated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGLangClient, StreamingClient])
def test_no_number_of_updates_fails_a_group_that_waits_for_its_turn(dialect: str, kind: type[SGLangClient]) -> None:
    """0.5.16 aborts whatever waits at each of them, before its first token."""
    updates, waiting = 2 * wire.MOST_TRIES, [group(0, 2), group(1, 2)]

    async def go() -> None:
        async with engines(dialect, "--max-running-requests", "0") as [worker]:
            client = kind([worker], 30)
            await up([worker], client)
            asked = asyncio.ensure_future(all_of(client, waiting))
            for version in range(1, updates + 1):
                await until(lambda: sum(route.load for route in client._router.routes) == 4)
                await asyncio.sleep(0.02)  # they wait in the server by now
                await push(worker, version)
            await fault(worker, most=9)
            assert_all_whole(waiting, await asked, version=updates)
            again = updates if dialect == "0.5.16" else 0
            assert (await calls(worker)).count("/generate") == (1 + again) * (2 if kind is StreamingClient else 1)

    asyncio.run(go())


def test_a_server_that_aborts_without_an_update_is_not_asked_for_ever() -> None:
    async def go() -> None:
        async with engines("0.5.16", "--max-running-requests", "0") as [worker]:
            client = SGLangClient([worker], 30)
            asked = asyncio.ensure_future(client.generate(group(0, 2)))
            server = (await live(worker)).call
            while not asked.done():
                await server.post("/abort_request", {"abort_all": True})
                await asyncio.sleep(0.01)
            with pytest.raises(EngineError, match="failed 4 times, at last: the server aborts it before its first tok"):
                await asked
            assert (await calls(worker)).count("/generate") == 1 + wire.MOST_TRIES

    asyncio.run(go())


# -- when a server fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 1], ids=["elsewhere", "by the successor"])
def test_a_server_killed_in_the_middle_of_a_rollout_loses_nothing(dialect: str, n: int) -> None:
    groups = [group(g, 4, tokens=40) for g in range(24)]

    async def go() -> None:
        async with engines(dialect, n=n) as workers:
            client = SGLangClient(workers, 10)
            await up(workers, client)
            await fault(workers[0], die_at=500)
            answers = await all_of(client, groups)
            assert_all_whole(groups, answers)
            await until(lambda: workers[0].engine._restarts == 1)  # whoever else could answer did so before
            assert all(route.load == 0 for route in client._router.routes)
            await until(lambda: all(route.up for route in client._router.routes))  # its successor is in service
            assert_all_whole(groups[:2], await all_of(client, groups[:2]))
            assert (await calls(workers[0])).count("/generate") >= 1

    asyncio.run(go())


def test_a_successor_without_the_weights_is_not_asked(dialect: str) -> None:
    groups = [group(g, 4, tokens=30) for g in range(8)]

    async def go() -> None:
        async with engines(dialect, n=2) as workers:
            client = SGLangClient(workers, 10)
            await up(workers, client)
            await asyncio.gather(*(push(worker, 3) for worker in workers))
            await fault(workers[0], die_at=200)
            assert_all_whole(groups, await all_of(client, groups), version=3)
            await live(workers[0])
            assert_all_whole(groups, await all_of(client, groups), version=3)
            assert "/generate" not in await calls(workers[0])
            await asyncio.gather(*(push(worker, 4) for worker in workers))
            await until(lambda: client._router.routes[0].up)
            assert_all_whole(groups, await all_of(client, groups), version=4)
            assert "/generate" in await calls(workers[0])

    asyncio.run(go())


def test_nobody_to_ask_is_an_error_with_every_reason() -> None:
    async def go() -> None:
        async with engines("0.5.16", n=2) as workers:
            client = SGLangClient(workers, 2.0)
            await up(workers, client)
            await asyncio.gather(*(push(worker, 1) for worker in workers))
            for worker in workers:
                (await live(worker)).process.stop()
            await until(lambda: all(worker.engine._restarts for worker in workers))
            with pytest.raises(EngineError, match="no engine was in service for 2 s: engine-0: its server") as error:
                await client.generate(group(0, 2))
            assert str(error.value).count("serves nothing until whole weights arrive") == 2

    asyncio.run(go())


def test_engines_that_are_gone_for_good() -> None:
    async def go() -> None:
        async with engines("0.5.16", n=2) as workers:
            client = SGLangClient(workers, 10)
            await up(workers, client)
            await workers[0].kill()
            (await live(workers[0])).process.stop()
            assert_all_whole([group(0, 4)], [await client.generate(group(0, 4))])
            await workers[1].kill()
            (await live(workers[1])).process.stop()
            with pytest.raises(EngineError, match="every engine is lost: engine-0: engine-0 is gone; engine-1: eng"):
                await client.generate(group(1, 1))

    asyncio.run(go())


def test_a_server_that_hangs_is_restarted_and_its_requests_asked_again(dialect: str) -> None:
    groups = [group(g, 4) for g in range(4)]

    async def go() -> None:
        async with engines(dialect, n=2) as workers:
            client = SGLangClient(workers, 1.0)
            await up(workers, client)
            await fault(workers[0], hang=True)
            assert_all_whole(groups, await all_of(client, groups))
            assert [worker.engine._restarts for worker in workers] == [1, 0]
            await until(lambda: client._router.routes[0].up)

    asyncio.run(go())


def test_a_busy_server_is_asked_again(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            client = SGLangClient([worker], 10)
            await up([worker], client)
            await fault(worker, busy=2)
            assert_all_whole([group(0, 2)], [await client.generate(group(0, 2))])
            assert not worker.engine._restarts
            await fault(worker, busy=99)
            with pytest.raises(EngineError, match="failed 4 times, at last: /generate: status 503: The request queue"):
                await client.generate(group(1, 2))

    asyncio.run(go())


@pytest.mark.parametrize(
    ("faults", "what"),
    [({"garbage": True}, "cannot be read: KeyError"), ({"null": True}, "logits are not finite; weights version 0@")],
)
def test_nonsense_is_not_passed_on(dialect: str, faults: dict[str, bool], what: str) -> None:
    async def go() -> None:
        async with engines(dialect, n=2) as workers:
            client = SGLangClient(workers, 10)
            await up(workers, client)
            await fault(workers[0], **faults)
            assert_all_whole([group(0, 1)], [await client.generate(group(0, 1))])  # by the other
            await fault(workers[1], **faults)
            with pytest.raises(EngineError, match=f"request 1/0 failed 4 times, at last: .*{what}"):
                await client.generate(group(1, 1))

    asyncio.run(go())


def test_a_request_that_cannot_be_answered_harms_no_other(dialect: str) -> None:
    long = [Request(f"9/{i}", [1] * 510, Sampling(6), 0) for i in range(2)]
    good = [group(g, 2) for g in range(3)]

    async def go() -> None:
        async with engines(dialect) as [worker]:
            client = SGLangClient([worker], 10)
            answers = await asyncio.gather(
                *(client.generate(requests) for requests in [good[0], long, *good[1:]]), return_exceptions=True
            )
            error = answers.pop(1)
            assert isinstance(error, EngineError) and "requests 9/0, 9/1 cannot be answered" in str(error)
            assert "exceeds the model's maximum context length of 512" in str(error)
            assert_all_whole(good, answers)  # type: ignore[arg-type]
            for tokens, what in (
                ([], "no prompt tokens"),
                ([3, 50], "token 50 is outside the model's vocabulary of 50"),
            ):
                with pytest.raises(EngineError, match=f"request x: {what}"):
                    await client.generate([Request("x", tokens, Sampling(3), 0)])
            assert not worker.engine._restarts  # as such a token would have it

    asyncio.run(go())


def test_an_answer_of_another_server_is_not_taken() -> None:
    """As when a server died, and its port went to one of another run."""

    async def go() -> None:
        async with engines("0.5.16", n=2) as workers:
            client = SGLangClient(workers, 1.0)
            await up(workers, client)
            for worker in workers:
                stamped = {"new_version": wire.stamp(0, "0badf00d"), "abort_all_requests": False}
                await (await live(worker)).call.post("/update_weight_version", stamped)
            with pytest.raises(EngineError, match="a server answered with weights '0@0badf00d'; those of ours end in"):
                await client.generate(group(0, 2))

    asyncio.run(go())


def test_who_gives_up_is_not_answered_any_more() -> None:
    async def go() -> None:
        async with engines("0.5.16") as [worker]:
            client = SGLangClient([worker], 10)
            await up([worker], client)
            asking = asyncio.ensure_future(client.generate(group(0, 2, tokens=300)))
            await asyncio.sleep(0.1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            (await live(worker)).process.stop()
            await until(lambda: client._router.routes[0].up and worker.engine._restarts)
            assert "/generate" not in await calls(worker)
            assert_all_whole([group(0, 2)], [await client.generate(group(0, 2))])

    asyncio.run(go())
