"""Engines whose servers are ``server.py``: real processes that speak SGLang's protocol, without SGLang."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from miles_core.edges.protocols import Completion, Request, Sampling, WorkerDied
from miles_core.edges.sglang import wire
from miles_core.edges.sglang.launch import Live
from miles_core.edges.sglang.server import SGLangEngine
from sglang_model import VOCAB, logprob_of, token_of

SERVER = str(Path(__file__).with_name("server.py"))
DIALECTS = ("0.5.16", "0.5.23")


@dataclass
class InProcess:
    """A worker whose engine lives in this process."""

    name: str
    engine: SGLangEngine
    dead: bool = False

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if self.dead:
            raise WorkerDied(f"{self.name} is gone")
        return await getattr(self.engine, method)(*args)

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        raise NotImplementedError

    async def kill(self) -> None:
        self.dead = True


def engine(dialect: str, *options: str, start_s: float = 20, timeout_s: float = 10, **more: Any) -> SGLangEngine:
    command = (sys.executable, SERVER, "--dialect", dialect, *options)
    words = ("--model-path", "some")
    return SGLangEngine(words, start_s, timeout_s, vocab=VOCAB, command=command, host="127.0.0.1", **more)


@asynccontextmanager
async def engines(dialect: str, *options: str, n: int = 1, **more: Any) -> AsyncIterator[list[InProcess]]:
    made = [InProcess(f"engine-{i}", engine(dialect, *options, **more)) for i in range(n)]
    try:
        yield made
    finally:
        await asyncio.gather(*(worker.engine.close() for worker in made))


async def live(worker: InProcess) -> Live:
    return await worker.engine._live()


async def fault(worker: InProcess, **faults: Any) -> None:
    await (await live(worker)).call.post("/fault", faults)


def told(url: str) -> Any:
    with urlopen(url) as reply:
        return json.load(reply)


async def calls(worker: InProcess) -> list[str]:
    """What the server was asked, paths in order."""
    paths: list[str] = told((await live(worker)).url + "/calls")
    return paths


async def until(condition: Callable[[], Any], patience_s: float = 15) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.005)


def weights(**values: int) -> wire.Tensors:
    return wire.Tensors((base64.b64encode(json.dumps(values).encode()).decode(),), "flattened_bucket")


async def push(worker: InProcess, version: int) -> None:
    await worker.engine.begin_update(version)
    await worker.engine.load(weights(a=version))
    await worker.engine.load(weights(b=version))
    await worker.engine.end_update()


def group(g: int, n: int, tokens: int = 6, **options: Any) -> list[Request]:
    return [Request(f"{g}/{i}", [1 + g, 2, 3], Sampling(tokens, **options), seed=100 * g + i) for i in range(n)]


def assert_whole(request: Request, completion: Completion, versions: list[int] | None = None) -> None:
    """Every token is what the model of ``sglang_model`` writes there, once, by whole weights of the token's version."""
    assert versions is None or completion.versions == versions
    assert len(completion.tokens) == len(completion.logprobs) == len(completion.versions)
    sequence = list(request.tokens)
    for token, value, version in zip(completion.tokens, completion.logprobs, completion.versions, strict=True):
        assert token == token_of(sequence, version)
        assert value == logprob_of(sequence, version, request.sampling.temperature)
        sequence.append(token)
