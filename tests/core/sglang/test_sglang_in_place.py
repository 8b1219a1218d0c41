"""``rollout.weights = "in_place"``: what is in flight finds again what old weights computed for it, and nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from miles_core.edges.protocols import Completion, Request
from miles_core.edges.sglang.calls import Caller
from miles_core.edges.sglang.client import KeepingClient, SGLangClient
from sglang_cases import InProcess, assert_whole, engines, group, push
from sglang_model import STALE_PREFIX
from test_sglang_weights import running

LONG = 200  # tokens


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Any]]:
    """Bodies and replies of /generate."""
    seen: list[tuple[dict[str, Any], Any]] = []
    post = Caller.post

    async def noted(self: Caller, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        reply = await post(self, path, body, timeout)
        if path == "/generate":
            seen.append((body, reply))
        return reply

    monkeypatch.setattr(Caller, "post", noted)
    return seen


def found(reply: Any) -> list[int]:
    """Of each request, tokens that the server needed not read."""
    return [told["meta_info"]["cached_tokens"] for told in reply]


async def across(client: SGLangClient, worker: InProcess, requests: list[Request], version: int) -> list[Completion]:
    """What ``requests`` get where an update comes while they are written."""
    asking = asyncio.ensure_future(client.generate(requests))
    await running(worker, len(requests))
    await push(worker, version)
    return await asking


def test_what_is_in_flight_finds_its_keys_and_values_again(
    dialect: str, asked: list[tuple[dict[str, Any], Any]]
) -> None:
    async def go() -> None:
        async with engines(dialect, keeps=True) as [worker]:
            client, requests = KeepingClient([worker], 10), group(0, 3, tokens=LONG)
            for request, completion in zip(requests, await across(client, worker, requests, 4), strict=True):
                assert_whole(request, completion)
                assert completion.finish == "length" and len(completion.tokens) == LONG
                assert set(completion.versions) == {0, 4} and completion.versions == sorted(completion.versions)
            (first, told), (second, again) = asked
            assert set(first["extra_key"]) == set(second["extra_key"]) and len(set(first["extra_key"])) == 1
            assert found(told) == [0] * 3
            assert found(again) == [len(prompt) - 1 for prompt in second["input_ids"]] and min(found(again)) > 10

    asyncio.run(go())


def test_who_asks_later_reads_the_same_prompt_by_the_new_weights(
    dialect: str, asked: list[tuple[dict[str, Any], Any]]
) -> None:
    """And by a name that no call has, of this client or another one."""

    async def go() -> None:
        async with engines(dialect, keeps=True) as [worker]:
            clients, requests = [KeepingClient([worker], 10) for _ in range(2)], group(0, 2, tokens=LONG)
            await across(clients[0], worker, requests, 1)
            for client in clients:
                asked.clear()
                for request, completion in zip(requests, await client.generate(requests), strict=True):
                    assert_whole(request, completion, [1] * LONG)
                assert [found(reply) for _, reply in asked] == [[0, 0]]

    asyncio.run(go())


def test_without_a_name_of_its_own_it_would_get_what_old_weights_computed(dialect: str) -> None:
    """The control: the server forgets nothing."""

    async def go() -> None:
        async with engines(dialect, keeps=True) as [worker]:
            client, requests = SGLangClient([worker], 10), group(0, 1)
            await client.generate(requests)
            await push(worker, 1)
            [completion] = await client.generate(requests)
            assert completion.tokens[0] == STALE_PREFIX

    asyncio.run(go())


def test_attempts_of_one_call_share_their_prompt(dialect: str, asked: list[tuple[dict[str, Any], Any]]) -> None:
    """Those of two calls do not, though they go to the server at once."""

    async def go() -> None:
        async with engines(dialect, keeps=True) as [worker]:
            client = KeepingClient([worker], 10)
            await asyncio.gather(client.generate(group(0, 2)), client.generate(group(1, 2)))
            keys = [key for body, _ in asked for key in body["extra_key"]]
            assert len(keys) == 4 and len(set(keys)) == 2

    asyncio.run(go())
