"""HTTP to one server: every call has a time limit, and a failure says what was asked and what went wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from ..http import Connections
from ..protocols import EngineError

QUICK_S = 30.0  # for calls that are a matter of milliseconds
TRIES, FIRST_WAIT_S = 3, 0.1  # of a call that may be repeated


class Unreachable(EngineError):
    """Nobody answers there, or the connection broke before there was an answer."""


class Silent(EngineError):
    """No answer in time."""


class Declined(EngineError):
    """The server answered, and said no."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Caller:
    """Connections to the server at ``url``, kept open between calls. Use it in one event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connections = Connections()  # no proxy: one for the outside world does not know the cluster's machines

    async def get(self, path: str, timeout: float = QUICK_S) -> Any:
        return await self._call("GET", path, None, timeout)

    async def post(self, path: str, body: dict[str, Any] | None = None, timeout: float = QUICK_S) -> Any:
        """What the server answers. Raises Unreachable, Silent after ``timeout`` seconds, or Declined.

        A status of 200 is not enough: weight updates also answer ``success``, which must not be false.
        """
        return await self._call("POST", path, body or {}, timeout)

    async def repeat(self, path: str, body: dict[str, Any] | None = None, timeout: float = QUICK_S) -> Any:
        """``post`` what does no harm when done twice; asked again when the connection breaks."""
        for attempt in range(TRIES):
            try:
                return await self.post(path, body, timeout)
            except Unreachable:
                if attempt + 1 == TRIES:
                    raise
                await asyncio.sleep(FIRST_WAIT_S * 4**attempt)
        raise AssertionError

    async def close(self) -> None:
        """Calls under way, and later ones, raise Unreachable."""
        await self._connections.close()

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            async with asyncio.timeout(timeout):
                status, told = await self._connections.ask(method, self._url + path, content)
        except TimeoutError as error:
            raise Silent(f"{path}: no answer within {timeout:g} s") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise Unreachable(f"{path}: {type(error).__name__}: {error}") from error
        return answer_of(path, status, told)


def answer_of(path: str, status: int, content: bytes) -> Any:
    """What a reply says. Raises Declined where that is no."""
    try:
        answer = json.loads(content) if content else None
    except ValueError:
        answer = content.decode(errors="replace")
    if status != 200 or (isinstance(answer, dict) and answer.get("success") is False):
        raise Declined(f"{path}: status {status}: {_message(answer)}", status)
    return answer


def _message(answer: Any) -> str:
    """What the server says is wrong, out of the several shapes that it says it in."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        answer = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    return str(answer or "it does not say why").strip()[:2000]
