"""Calls down one connection: obeyed in the order they are sent, ahead of the replies to those before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from miles_core.edges.sglang import line
from miles_core.edges.sglang.calls import Declined, Silent, Unreachable
from miles_core.edges.sglang.line import Line


class Slow:
    """A server that takes the next call of a connection when it has answered the one before, as uvicorn does."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.connections = 0
        self.go = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split()[1].decode()
                size = next(int(row[15:]) for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:"))
                await reader.readexactly(size)
                self.paths.append(path)
                await self.go.acquire()
                if path == "/die":
                    break
                text = b'{"success": false, "message": "full"}' if path == "/no" else b'{"success": true}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx: y\r\n\r\n%s" % (len(text), text))
        except asyncio.IncompleteReadError:
            pass
        writer.close()


@asynccontextmanager
async def slow() -> AsyncIterator[tuple[Slow, Line]]:
    server = Slow()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    one = Line(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    try:
        yield server, one
    finally:
        one.close()
        listening.close()


def test_calls_are_obeyed_in_their_order_over_one_connection() -> None:
    async def go() -> None:
        async with slow() as (server, one):
            paths = [f"/{i}" for i in range(20)]
            answers = [await one.send(path, {"names": ["x"] * 1000}) for path in paths]  # none is answered yet
            waiting = [
                asyncio.ensure_future(one.wait(path, answer, 10)) for path, answer in zip(paths, answers, strict=True)
            ]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting) and server.paths == ["/0"]
            for _ in range(20):
                server.go.release()
            assert await asyncio.gather(*waiting) == [{"success": True}] * 20
            assert server.paths == paths and server.connections == 1

    asyncio.run(go())


def test_what_a_server_declines_is_told_to_that_call_alone() -> None:
    async def go() -> None:
        async with slow() as (server, one):
            paths = ["/1", "/no", "/2"]
            answers = [await one.send(path, {}) for path in paths]
            for _ in paths:
                server.go.release()
            assert await one.wait("/1", answers[0], 10) == await one.wait("/2", answers[2], 10) == {"success": True}
            with pytest.raises(Declined, match="/no: status 200: full"):
                await one.wait("/no", answers[1], 10)

    asyncio.run(go())


def test_a_server_that_dies_or_says_nothing_is_told_to_all_that_wait() -> None:
    async def go() -> None:
        async with slow() as (server, one):
            answers = [await one.send(path, {}) for path in ("/die", "/1")]
            with pytest.raises(Silent, match="/1: no answer within 0.1 s"):
                await one.wait("/1", answers[1], 0.1)
            server.go.release()
            for path, answer in zip(("/die", "/1"), answers, strict=True):
                with pytest.raises(Unreachable, match=f"{path}: IncompleteReadError"):
                    await one.wait(path, answer, 10)
            server.go.release()
            assert await one.wait("/2", await one.send("/2", {}), 10) == {"success": True}  # by another connection
            answer = await one.send("/3", {})
            one.close()
            with pytest.raises(Unreachable, match="/3: the connection was given up"):
                await one.wait("/3", answer, 10)
        with pytest.raises(Unreachable, match="/4: ConnectionRefusedError"):
            await one.send("/4", {})

    asyncio.run(go())


def test_a_connection_that_was_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with slow() as (server, one):
            for wait_s, connections in ((0.0, 1), (0.0, 1), (0.2, 2)):
                await asyncio.sleep(wait_s)
                server.go.release()
                await one.wait("/1", await one.send("/1", {}), 10)
                assert server.connections == connections

    monkeypatch.setattr(line, "IDLE_S", 0.1)
    asyncio.run(go())
