"""Calls to a server: bodies of any size, and what becomes of a connection that breaks, waits or is wanted no more."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from miles_core.edges import http
from miles_core.edges.sglang.calls import Caller, Declined, Silent, Unreachable

MIB = 1 << 20
HEAD = "HTTP/1.1 {} X\r\ncontent-length: {}\r\n{}\r\n"


class Odd:
    """A server that answers by what the path says."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                path = head.split()[1]
                fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                assert "cookie" not in fields and "transfer-encoding" not in fields
                content = await reader.readexactly(int(fields.get("content-length", 0)))
                self.paths.append(path)
                self.sizes.append(len(content))
                if path == "/hang":
                    await reader.read()
                if path == "/large":
                    content = b'"' + b"x" * (5 * MIB) + b'"'
                more = "location: /well\r\nset-cookie: a=b\r\n" if path == "/elsewhere" else ""
                status = 307 if path == "/elsewhere" else 200
                text = HEAD.format(status, len(content), more).encode() + content
                writer.write({"/dead": b"", "/half": text[:-1], "/odd": b"HELO\r\n\r\n"}.get(path, text))
                if path in ("/dead", "/half", "/odd", "/last"):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):  # the loop ends
            pass
        writer.close()


@asynccontextmanager
async def odd() -> AsyncIterator[tuple[Odd, Caller]]:
    server = Odd()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    call = Caller(f"http://localhost:{port}")  # cookies of numbers would be kept nowhere
    try:
        yield server, call
    finally:
        await call.close()
        listening.close()


def run(go: Callable[[Odd, Caller], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with odd() as (server, call):
            await go(server, call)

    asyncio.run(all_of_it())


@pytest.mark.filterwarnings("error:Sending a large body")
def test_bodies_and_replies_of_many_megabytes_arrive_whole() -> None:
    async def go(server: Odd, call: Caller) -> None:
        body = {"input_ids": list(range(MIB))}
        assert await call.post("/echo", body) == body and server.sizes[-1] > 6 * MIB
        assert await call.get("/large") == "x" * 5 * MIB
        assert await call.post("/echo") == {} and server.sizes == [server.sizes[0], 0, 2]
        assert server.connections == 1

    run(go)


def test_a_kept_connection_that_the_server_closed_fails_no_call() -> None:
    async def go(server: Odd, call: Caller) -> None:
        await call.post("/last")
        await asyncio.sleep(0.05)
        await call.post("/well")
        assert server.connections == 2

    run(go)


@pytest.mark.parametrize("path, why", [("/dead", "ServerDisc"), ("/half", "ClientPayload"), ("/odd", "ClientResponse")])
def test_what_breaks_in_the_middle_is_not_posted_twice(path: str, why: str) -> None:
    """It may have been obeyed; of weights that are loaded, twice would be a fault."""

    async def go(server: Odd, call: Caller) -> None:
        await call.post("/well")  # a connection to keep
        with pytest.raises(Unreachable, match=rf"{path}: {why}\w*Error: \w+"):
            await call.post(path, {"a": 1})
        assert server.paths == ["/well", path]

    run(go)


def test_a_connection_whose_reply_was_not_waited_for_is_not_used_again() -> None:
    async def go(server: Odd, call: Caller) -> None:
        await call.post("/well")
        with pytest.raises(Silent, match="/hang: no answer within 0.05 s"):
            await call.post("/hang", timeout=0.05)
        assert await call.post("/echo", {"a": 1}) == {"a": 1} and server.connections == 2
        given_up = asyncio.ensure_future(call.post("/hang"))
        await asyncio.sleep(0.05)
        given_up.cancel()
        assert await call.post("/echo", {"a": 2}) == {"a": 2} and server.connections == 3

    run(go)


def test_a_connection_that_was_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(server: Odd, call: Caller) -> None:
        for wait_s, connections in ((0.0, 1), (0.0, 1), (0.2, 2)):
            await asyncio.sleep(wait_s)
            await call.post("/well")
            assert server.connections == connections

    monkeypatch.setattr(http, "IDLE_S", 0.1)
    run(go)


def test_as_many_calls_at_once_as_there_are() -> None:
    async def go(server: Odd, call: Caller) -> None:
        waiting = [asyncio.ensure_future(call.post("/hang")) for _ in range(150)]
        async with asyncio.timeout(10):
            while len(server.paths) < 150:
                await asyncio.sleep(0.01)
        await call.close()
        assert {type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {Unreachable}

    run(go)


def test_it_follows_nobody_and_keeps_no_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(server: Odd, call: Caller) -> None:
        with pytest.raises(Declined, match="/elsewhere: status 307"):
            await call.post("/elsewhere")
        await call.get("/well")  # the server looks for cookies
        assert server.paths == ["/elsewhere", "/well"]

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    run(go)


@pytest.mark.parametrize("used", [True, False])
def test_after_the_end_no_call_is_made(used: bool) -> None:
    async def go(server: Odd, call: Caller) -> None:
        if used:
            await call.get("/well")
        await asyncio.gather(call.close(), call.close())
        with pytest.raises(Unreachable, match="/more: .* given up"):
            await call.repeat("/more")
        assert server.paths == ["/well"] * used

    run(go)


@pytest.mark.parametrize("place", ["http://127.0.0.1:9", f"http://{'x' * 70}.org", "http://h:99999", "ftp://h"])
def test_who_cannot_be_reached_is_said(place: str) -> None:
    async def go() -> None:
        with pytest.raises(Unreachable, match=r"/x: \w+Error: \w+"):
            await Caller(place).post("/x")

    asyncio.run(go())


def test_connections_that_nobody_closes_end_with_the_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    """As those of a client of engines do, which is dropped with the last of its rollouts."""

    async def go() -> None:
        server = Odd()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        call = Caller(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        await call.post("/well")
        listening.close()

    gc.collect()  # what other tests left is theirs
    caplog.clear()
    asyncio.run(go())
    gc.collect()
    assert not caplog.records
