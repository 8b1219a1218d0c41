"""A real SGLang server on a GPU, and what is compared with a trainer there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import SHAPE, Trainer, pack, run_of
from miles_core.edges.protocols import Completion, Request, Sampling
from miles_core.edges.sglang import SGLang
from serving import START_S, Served
from serving import serving as launched


def arguments(folder: Path, table: dict[str, Any], layout: str) -> tuple[Any, ...]:
    """What a run would construct its engine with."""
    run = run_of(folder, layout, rollout={"timeout_s": START_S})
    [process] = SGLang(SGLang.Config(**table), run).miles_engines().processes
    return process.args


@contextmanager
def serving(
    folder: Path,
    table: dict[str, Any],
    hang_s: float,
    layout: str = "colocate",
    words: tuple[str, ...] = (),
    command: tuple[str, ...] = (),
) -> Iterator[Served]:
    """``words`` are arguments that a run may not set, and ``command`` what starts the server if not its own module."""
    said, *rest = arguments(folder, table, layout)
    with launched(((*said, *words), *rest), hang_s=hang_s, command=command) as served:
        yield served


def group(number: int, attempts: int, tokens: int, **sampling: Any) -> list[Request]:
    """Requests with one prompt; another number, another prompt."""
    prompt = np.random.default_rng(number).integers(0, SHAPE["vocab_size"], 32).tolist()
    return [Request(f"{number}/{i}", prompt, Sampling(tokens, **sampling), seed=i) for i in range(attempts)]


def push(served: Served, one: Trainer, transport: Any, version: int, verify: bool = False) -> dict[str, float]:
    """Weights to the engine, as the loop moves them."""
    servers = [served.ask("begin_update", version)]
    told: dict[str, float] = transport.send(one.model.export(), verify, servers=servers)
    served.ask("end_update")
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
