"""An engine that writes random tokens in the time that a real one would take: responses of heavy-tailed lengths."""

from __future__ import annotations

import asyncio
import math
import random
import time
from pathlib import Path
from typing import Any

from miles_core import Plugin, hookimpl
from miles_core.edges.protocols import Bucket, Completion, Engines, Process, Request


class SimulatedEngine:
    """Serves ``slots`` requests at once, ``token_s`` seconds a token; lengths are log-normal, by a request's seed."""

    def __init__(self, slots: int, token_s: float, median: float, sigma: float) -> None:
        self._free, self._token_s = asyncio.Semaphore(slots), token_s
        self._mu, self._sigma = math.log(median), sigma
        self._stood, self._stands = 0.0, 0.0  # seconds without tokens so far; since when it stands still, or 0
        self._writes = asyncio.Event()
        self._writes.set()
        self._moved = [(0.0, 0)]  # when a version of the weights was there, and which

    async def ready(self) -> str:
        return ""

    async def health(self) -> dict[str, Any]:
        return {"version": self._moved[-1][1], "stale": False, "running": 0, "waiting": 0}

    async def generate(self, requests: list[Request]) -> list[Completion]:
        return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: Request) -> Completion:
        draw = random.Random(request.seed)
        length = max(1, min(request.sampling.max_tokens, round(draw.lognormvariate(self._mu, self._sigma))))
        async with self._free:
            began = self._now()
            while (left := began + length * self._token_s - self._now()) > 0:
                await self._writes.wait()
                await asyncio.sleep(left)
        versions = [self._at(began + i * self._token_s) for i in range(length)]
        tokens = [draw.randrange(2, 12) for _ in range(length)]
        return Completion(tokens, [-math.log(10.0)] * length, versions, "length")

    def _now(self) -> float:
        """A clock that stands still while no tokens are written."""
        return (self._stands or time.monotonic()) - self._stood

    def _at(self, when: float) -> int:
        return next(version for moved, version in reversed(self._moved) if moved <= when)

    async def begin_update(self, version: int) -> str:
        self._stands, self._next = self._stands or time.monotonic(), version
        self._writes.clear()
        return ""

    async def load(self, bucket: Bucket) -> dict[str, int]:
        return {piece.name: piece.checksum for piece in bucket.pieces if piece.checksum is not None}

    async def end_update(self) -> None:
        self._moved.append((self._now(), self._next))
        await self.abort_update()

    async def abort_update(self) -> None:
        self._stood, self._stands = self._stood + time.monotonic() - self._stands, 0.0
        self._writes.set()


class Simulated(Plugin):
    class Config(Plugin.Config):
        slots: int = 64  # requests an engine serves at once
        token_s: float = 0.002
        median: float = 60.0  # tokens of a response
        sigma: float = 1.0  # of the logarithm of its length: the mean is 1.65 times the median, one in 100 ten times it
        train_s: float = 0.0  # seconds of a training step, beside what a tiny model takes

    config: Config

    @hookimpl
    def miles_engines(self) -> Engines:
        c = self.config
        args = (c.slots, c.token_s, c.median, c.sigma)
        target = f"{Path(__file__).parent.name}.{Path(__file__).stem}:SimulatedEngine"
        engines = [Process(f"engine-{i}", target, args) for i in range(self.run.placement.engines)]
        streams = self.run.mode == "async" and self.run.max_staleness > 0
        client = "StreamingClient" if streams else "LocalClient"
        return Engines(engines, client=f"miles_core.edges.local.client:{client}")

    @hookimpl
    def miles_normalize(self, batches: list[Any], total: Any) -> None:
        time.sleep(self.config.train_s)
