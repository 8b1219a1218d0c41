"""A real SGLang server and the engine that runs it, in an event loop of its own, for tests that are not coroutines."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import SHAPE, Trainer, pack, run_of
from miles_core.edges.protocols import Completion, Request, Sampling
from miles_core.edges.sglang import SGLang
from miles_core.edges.sglang.client import SGLangClient
from miles_core.edges.sglang.launch import Live
from miles_core.edges.sglang.server import SGLangEngine

START_S = 400.0  # for a server to come up, kernels that it compiles included


class Turning:
    """An event loop that turns in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)


@dataclass
class InProcess:
    """A worker whose engine lives in this process."""

    name: str
    engine: SGLangEngine
    turning: Turning

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await asyncio.wrap_future(self.turning.submit(getattr(self.engine, method)(*args)))  # from any loop

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return self.turning.submit(getattr(self.engine, method)(*args)).result(timeout or START_S)

    async def kill(self) -> None:
        raise NotImplementedError


@dataclass
class Served:
    """One engine, a client of it, and the version of its weights."""

    worker: InProcess
    client: SGLangClient
    version: int = 0

    def ask(self, method: str, *args: Any) -> Any:
        return self.worker.ask(method, *args)

    def start(self, requests: list[Request]) -> Future[list[Completion]]:
        return self.worker.turning.submit(self.client.generate(requests))

    def generate(self, requests: list[Request]) -> list[Completion]:
        return self.start(requests).result(START_S)

    def live(self) -> Live:
        """The server, once it is up."""
        found: Live = self.worker.turning.submit(self.worker.engine._live()).result(START_S)
        return found


def arguments(folder: Path, table: dict[str, Any], layout: str) -> tuple[Any, ...]:
    """What a run would construct its engine with."""
    run = run_of(folder, layout, rollout={"timeout_s": START_S})
    [process] = SGLang(SGLang.Config(**table), run).miles_engines().processes
    return process.args


@contextmanager
def serving(folder: Path, table: dict[str, Any], hang_s: float, layout: str = "colocate") -> Iterator[Served]:
    turning, args = Turning(), arguments(folder, table, layout)

    async def make() -> Served:
        worker = InProcess("engine-0", SGLangEngine(*args, hang_s=hang_s), turning)
        return Served(worker, SGLangClient([worker], START_S))

    served: Served = turning.submit(make()).result()
    try:
        served.ask("ready")
        yield served
    finally:
        served.ask("close")
        turning.loop.call_soon_threadsafe(turning.loop.stop)


def group(number: int, attempts: int, tokens: int, **sampling: Any) -> list[Request]:
    """Requests with one prompt; another number, another prompt."""
    prompt = np.random.default_rng(number).integers(0, SHAPE["vocab_size"], 32).tolist()
    return [Request(f"{number}/{i}", prompt, Sampling(tokens, **sampling), seed=i) for i in range(attempts)]


def push(served: Served, one: Trainer, transport: Any, version: int, verify: bool = False) -> dict[str, float]:
    """Weights to the engine, as the loop moves them."""
    served.ask("begin_update")
    told: dict[str, float] = transport.send(one.model.export(), verify)
    served.ask("end_update", version)
    served.version = version
    return told


def assert_bounded(one: Trainer, transport: Any, bucket: int, move: Any) -> None:
    """``move`` takes two buckets, a copy of the largest tensor where that is larger, and what is gathered for one."""
    torch.cuda.synchronize()
    largest = max(tensor.nbytes for tensor in one.export().values())
    assert largest > bucket
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    move()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 3 * bucket + largest + (4 << 20)
    assert torch.cuda.memory_allocated() - before <= 2 * bucket + (4 << 20)


def assert_whole(requests: list[Request], completions: list[Completion], version: int) -> None:
    """Every token is there once, of one version."""
    for request, completion in zip(requests, completions, strict=True):
        n = request.sampling.max_tokens
        assert completion.finish == "length"
        assert len(completion.tokens) == len(completion.logprobs) == n and completion.versions == [version] * n
        assert all(logprob <= 0 for logprob in completion.logprobs)


def apart(one: Trainer, requests: list[Request], completions: list[Completion], version: int | None = None) -> float:
    """Mean absolute difference of the log-probabilities that engine and trainer give the sampled tokens; of those that
    ``version`` wrote, where one is named."""
    rows = [
        (
            request.tokens + completion.tokens,
            [0.0] * len(request.tokens) + [float(version in (None, wrote)) for wrote in completion.versions],
        )
        for request, completion in zip(requests, completions, strict=True)
    ]
    told = [
        value
        for request, completion in zip(requests, completions, strict=True)
        for value in [0.0] * len(request.tokens) + completion.logprobs
    ]
    batch = pack(rows, told, requests[0].sampling.temperature)
    [found] = one.logprobs([batch])
    assert batch.rollout_logprobs is not None
    return float(((found - batch.rollout_logprobs).abs() * batch.mask).sum() / batch.mask.sum())
