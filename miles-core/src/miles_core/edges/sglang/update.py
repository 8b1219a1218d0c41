"""One update of a server's weights, from the call that begins it to the one that ends it or gives it up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..protocols import EngineError, TransportError
from . import wire
from .calls import Caller, Unreachable
from .launch import Live
from .line import Line
from .proof import Check, Proof
from .use import requests

GIVEN_UP = "its update was given up meanwhile"
CUTS, CUT_S = 30, 0.01  # looks whether requests are back, and seconds between two


async def halt(live: Live, paused: bool, keeps: bool, cutting: asyncio.Lock, timeout: float) -> None:
    """Have a server write nothing. ``paused``: it was told to keep its requests where they are. ``keeps``: what is in
    flight is to find its keys and values again; SGLang's own way of that may still compute by the old weights while
    the new ones come. ``cutting`` is held while requests come back that are to be asked for anew."""
    if live.sessions and not keeps:
        await live.call.repeat("/pause_generation", {"mode": "retract"})
        return
    await unpin(live.call, paused)
    async with cutting:
        await cut_short(live.call, timeout)


async def unpin(call: Caller, paused: bool) -> None:
    """Make requests of a paused server abortable: those that keep their place are, but by their next token."""
    if paused:
        await call.repeat("/pause_generation", {"mode": "retract"})


async def cut_short(call: Caller, timeout: float) -> None:
    """Have every request in flight come back aborted, with the tokens it has, and new ones wait. 0.5.16, left to
    itself, would go on with what it computed by the old weights, and could not tell whose tokens are whose.

    Its own way of doing both, the pause of mode "abort", looks once a second whether all are back, so with any in
    flight it takes that second, in which nothing is sampled. It is what makes sure of those that slipped past, which
    would stand still now, and fail the flush later: they are told to come back a moment before.
    """
    for _ in range(CUTS):
        if not any((await requests(call)).values()):
            break
        await call.repeat("/abort_request", {"abort_all": True})
        await asyncio.sleep(CUT_S)
    await call.repeat("/pause_generation", {"mode": "retract"})
    if any((await requests(call)).values()):
        await call.repeat("/abort_request", {"abort_all": True})
        await asyncio.sleep(CUT_S)
        await call.post("/pause_generation", {"mode": "abort"}, timeout=timeout)
        await call.repeat("/pause_generation", {"mode": "retract"})  # after the other, for one that slipped past it


class Update:
    """Hands buckets to the server in the order they come, without waiting until it has loaded those before."""

    def __init__(self, live: Live, forget: bool, wake: Callable[[], Awaitable[None]] | None) -> None:
        """``forget``: have the server forget, with the first bucket, what old weights computed; nothing is running.
        ``wake`` is called before the first bucket, where the server has given its memory up."""
        self.live, self._forget, self._wake = live, forget, wake
        self.version = 0  # of the weights that come
        self.loads = 0  # calls that may have changed weights
        self.proof: Proof | None = None
        self._line = Line(live.url)
        self._handing, self._sending = asyncio.Lock(), asyncio.Lock()
        self._over = self._handed = False

    def expect(self, version: int) -> str:
        """``version`` of the weights that come. Returns which server they come to."""
        self.version = version
        return self.live.address

    @property
    def touched(self) -> bool:
        """Whether the server's weights may be of no version."""
        return bool(self.loads or self._wake)

    async def load(self, bucket: wire.Tensors, timeout: float) -> None:
        """Returns once the server has said that it loaded it. Raises EngineError, with the last words of a server that
        ended at it."""
        self.loads += 1
        async with self._handing:
            self._check()
            if self._wake:
                await self._wake()
                self._wake = None
                self._check()
            if self.proof and not self._handed:
                await self.proof.begin()
                self._check()
            path, body = wire.update(bucket, wire.stamp(self.version, self.live.mark), self._forget)
            answer = await self._line.send(path, body)
            self._forget, self._handed = False, True
        try:
            await self._line.wait(path, answer, timeout)
        except Unreachable as error:
            if self._over:
                raise
            raise Unreachable(f"{error}{await self.live.last_words()}") from error

    def prove(self, check: Check) -> None:
        """Have it found out whether all buckets arrive. Each rank that sends asks for it before its first one."""
        self.proof = self.proof or Proof(check)

    async def take_turn(self) -> None:
        """Wait until no other rank sends. Two that broadcast to several engines at once would each find one engine
        busy with the other's bucket, for ever."""
        await self._sending.acquire()
        if self._over:
            self.end_turn()  # the next one hears of it too
            raise TransportError(GIVEN_UP)

    def end_turn(self) -> None:
        if self._sending.locked():
            self._sending.release()

    def end(self) -> None:
        """No bucket comes any more, or none is wanted."""
        self._over = True
        self._line.close()
        self.end_turn()

    def _check(self) -> None:
        if self._over:
            raise EngineError(GIVEN_UP)
