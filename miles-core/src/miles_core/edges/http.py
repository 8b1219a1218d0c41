"""HTTP to servers: connections that are kept between calls, and closed with the event loop that they are used in."""

from __future__ import annotations

import asyncio
from io import BytesIO
from math import inf

import aiohttp

# Uvicorn closes a connection that was idle for 5 s; one that is used in that very moment fails for no reason.
IDLE_S = 2.0


class Connections:
    """As many as there are calls, each kept for ``IDLE_S`` after its last one. Use them in one event loop.

    There are no time limits; put ``asyncio.timeout`` around a call, which closes its connection when it is over too
    early. Redirects are not followed, cookies not kept, and a proxy is used only if ``trust_env``, by what the
    environment says of proxies.
    """

    def __init__(self, trust_env: bool = False) -> None:
        self._trust_env, self._closed = trust_env, False
        self._session: aiohttp.ClientSession | None = None  # it wants to be made in the event loop that uses it
        self._keeping: asyncio.Task[None] | None = None

    async def ask(self, method: str, url: str, content: bytes | None = None) -> tuple[int, bytes]:
        """Status and content of the reply to JSON. A GET, and nothing else, is repeated, once, when the server closed a
        connection that was kept.

        Raises aiohttp.ClientError, also after ``close``; ValueError of a host that cannot be one.
        """
        if self._closed:
            raise aiohttp.ClientConnectionError("the connections to it were given up")
        session = self._session = self._session or self._open()
        # As a stream of known length: more than 1 MiB of bytes would be warned of.
        data = None if content is None else BytesIO(content)
        async with session.request(method, url, data=data, allow_redirects=False) as reply:
            return reply.status, await reply.read()

    async def close(self) -> None:
        """Calls under way raise aiohttp.ClientError. May be called twice."""
        self._closed = True
        if self._keeping:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])

    def _open(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),  # 0: no limit
            timeout=aiohttp.ClientTimeout(),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"content-type": "application/json"},
            trust_env=self._trust_env,
        )
        # Begun at once, so that it ends in order however soon it is cancelled.
        self._keeping = asyncio.Task(_keep(session), loop=asyncio.get_running_loop(), eager_start=True)
        return session


async def _keep(session: aiohttp.ClientSession) -> None:
    """Closes it when cancelled, as whatever is left in an event loop is when that ends: not everybody who asks servers
    is told that nothing more is wanted."""
    try:
        await asyncio.sleep(inf)
    finally:
        await session.close()
