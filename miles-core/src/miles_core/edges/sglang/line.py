"""One connection to a server, down which calls go without waiting for the replies to those before."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from ..http import IDLE_S
from .calls import Silent, Unreachable, answer_of

MOST_BYTES = 1 << 20  # of a line in a reply's head


class Line:
    """Calls that a server obeys one after another, in the order they are sent (HTTP/1.1 pipelining, RFC 9112, 9.3.2).

    A server that has loaded a bucket of weights finds the next one already there. Over several connections it could
    take the second first, and two servers in different orders: then each would wait for the other in its broadcast.
    aiohttp sends nothing before it has the reply to what it sent. Use it in one event loop.
    """

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._awaited: deque[tuple[str, asyncio.Future[Any]]] = deque()  # what was sent and is not answered
        self._quiet_since = 0.0

    async def send(self, path: str, body: dict[str, Any]) -> asyncio.Future[Any]:
        """Returns what will bring the answer; give it to ``wait``. Send one, and then the next. Raises Unreachable."""
        if self._writer and not self._awaited and monotonic() - self._quiet_since > IDLE_S:
            self.close()  # by now the server may have closed it too
        if self._writer is None:
            try:
                reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=MOST_BYTES)
            except OSError as error:
                raise Unreachable(f"{path}: {type(error).__name__}: {error}") from error
            self._reading = asyncio.ensure_future(self._read(reader))
        content = json.dumps(body, separators=(",", ":")).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._awaited.append((path, answer))
        self._writer.write(head.encode() + content)
        return answer

    async def wait(self, path: str, answer: asyncio.Future[Any], timeout: float) -> Any:
        """What the server answers. Raises Unreachable, Silent after ``timeout`` seconds, or Declined."""
        try:
            return await asyncio.wait_for(asyncio.shield(answer), timeout)
        except TimeoutError as error:
            raise Silent(f"{path}: no answer within {timeout:g} s") from error

    def close(self) -> None:
        """Whoever waits for an answer gets Unreachable. May be called twice."""
        if self._reading:
            self._reading.cancel()
        self._break("the connection was given up")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Consumes replies, in the order of the calls. Ends with the connection."""
        try:
            while True:
                status, content = await _reply(reader)
                path, answer = self._awaited.popleft()
                self._quiet_since = monotonic()
                if answer.done():
                    continue
                try:
                    answer.set_result(answer_of(path, status, content))
                except Exception as error:
                    answer.set_exception(error)
                    answer.exception()  # it may be that nobody waits any more
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            self._break(f"{type(error).__name__}: {error}")

    def _break(self, why: str) -> None:
        if self._writer:
            with suppress(OSError, RuntimeError):
                self._writer.close()
        self._writer = self._reading = None
        while self._awaited:
            path, answer = self._awaited.popleft()
            if not answer.done():
                answer.set_exception(Unreachable(f"{path}: {why}"))
                answer.exception()


async def _reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and content of the next one. Raises ValueError where it is none that SGLang sends to a call."""
    status = int((await reader.readuntil(b"\r\n")).split(None, 2)[1])
    length = -1
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    if length < 0:
        raise ValueError("a reply without its length")
    return status, await reader.readexactly(length)
