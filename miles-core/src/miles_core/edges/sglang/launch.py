"""Start a server, on a port of its own, and wait until it is known to be ours and well."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from ..protocols import EngineError
from . import wire
from .calls import Caller, Declined, Silent, Unreachable
from .process import ServerProcess, free_port, is_free

PORTS = 5  # tried, where somebody else takes the first ones
LOOK_S = 0.2
ENDING_S = 5.0  # for one that closed its connections to be gone
KNOWN_S = 5.0  # a server says which one it is at once, if it listens


class PortTaken(Exception):
    """Somebody else listens there."""


@dataclass(frozen=True, slots=True)
class Live:
    """A server that answers."""

    process: ServerProcess
    url: str
    mark: str  # in its replies, and in no other server's
    call: Caller
    sessions: bool  # whether weights must come between begin_weight_update and end_weight_update
    release: str  # SGLang's own version
    memory: dict[str, float]  # of its first rank: GiB of "weight" and "kvcache", tokens of "token_capacity"; or empty

    @property
    def size(self) -> int | None:
        """Bytes of weights and cache on each GPU; None where it did not tell."""
        return int((self.memory["weight"] + self.memory["kvcache"]) * 2**30) if self.memory else None

    @property
    def address(self) -> str:
        return wire.address(self.url, self.mark)

    def has(self) -> str:
        """What it takes of its GPUs, in words."""
        if not self.memory:
            return f"SGLang {self.release}"
        weights, cache, tokens = (self.memory[key] for key in ("weight", "kvcache", "token_capacity"))
        return f"SGLang {self.release}: {weights:.1f} GB of weights, {cache:.1f} GB of cache for {tokens:,} tokens"

    async def last_words(self) -> str:
        """What it printed last, to be put behind a complaint; "" if it is still there."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.ended.wait(), ENDING_S)
        return "" if self.process.alive else await asyncio.to_thread(self.process.last_words)

    async def end(self) -> None:
        """Kill it, and wait until it is gone, even when cancelled: whoever starts its successor, or closes the engine
        meanwhile, is to find its memory free."""
        killing = asyncio.ensure_future(asyncio.to_thread(self.process.kill))
        try:
            await asyncio.shield(killing)
        finally:
            await killing
            await self.call.close()


async def launch(command: Sequence[str], host: str, timeout_s: float) -> Live:
    """A server at ``host``, which calls the weights it has from the disk version 0.

    Raises EngineError with the server's last words when it ends, or is not well within ``timeout_s``; nothing of it
    is left then.
    """
    deadline = monotonic() + timeout_s
    for _ in range(PORTS):
        port, mark = free_port(host), secrets.token_hex(4)
        words = ("--host", host, "--port", str(port), "--weight-version", wire.stamp(0, mark))
        url = f"http://{host}:{port}"
        process, call = ServerProcess([*command, *words]), Caller(url)
        try:
            while not await _well(process, call, mark, host, port):
                if monotonic() > deadline:
                    raise EngineError(f"the SGLang server is not well after {timeout_s:g} s{process.last_words()}")
                await asyncio.sleep(LOOK_S)
            told = await call.get("/server_info")  # its scheduler answers this one, not the web server alone
            [state, *_] = told.get("internal_states") or [{}]
            release, memory = str(told.get("version", "?")), state.get("memory_usage") or {}
            return Live(process, url, mark, call, await _has_sessions(call), release, memory)
        except BaseException as error:
            process.kill()
            await call.close()
            if not isinstance(error, PortTaken):
                raise
    raise EngineError(f"the SGLang server found no port on {host}: {PORTS} that were free were taken before it came up")


async def _well(process: ServerProcess, call: Caller, mark: str, host: str, port: int) -> bool:
    """Whether the server generates by now. Raises PortTaken, or EngineError when it ended."""
    if not process.alive:
        if not is_free(host, port):
            raise PortTaken
        raise EngineError(f"the SGLang server ended while it was starting{process.last_words()}")
    try:
        told = await call.get("/model_info", timeout=KNOWN_S)
        wire.version_of(told["weight_version"], mark)
    except (Unreachable, Silent):
        return False  # nobody listens there yet
    except (wire.Stranger, Declined, KeyError, TypeError):
        raise PortTaken from None  # a server answers, and it is not the one started here
    try:
        await call.get("/health")
    except (Unreachable, Silent, Declined):
        return False
    return True


async def _has_sessions(call: Caller) -> bool:
    """0.5.16 has no such route; later ones refuse to end what was not begun."""
    try:
        await call.post("/end_weight_update")
    except Declined as error:
        return error.status != 404
    return True
