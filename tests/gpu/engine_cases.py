"""A real SGLang server on a GPU, and what is compared with a trainer there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import SHAPE, Trainer, pack, run_of
from miles_core.edges.protocols import Completion, Request, Sampling
from miles_core.edges.sglang import SGLang
from serving import START_S, Served
from serving import serving as launched


def arguments(folder: Path, table: dict[str, Any]) -> tuple[Any, ...]:
    """What a run in turns would construct its engine with."""
    run = run_of(folder, "colocate", rollout={"timeout_s": START_S})
    [process] = SGLang(SGLang.Config(**table), run).miles_engines().processes
    return process.args


@contextmanager
def serving(folder: Path, table: dict[str, Any], hang_s: float) -> Iterator[Served]:
    with launched(arguments(folder, table), hang_s=hang_s) as served:
        yield served


def group(number: int, attempts: int, tokens: int, **sampling: Any) -> list[Request]:
    """Requests with one prompt; another number, another prompt."""
    prompt = np.random.default_rng(number).integers(0, SHAPE["vocab_size"], 32).tolist()
    return [Request(f"{number}/{i}", prompt, Sampling(tokens, **sampling), seed=i) for i in range(attempts)]


def assert_whole(requests: list[Request], completions: list[Completion], version: int) -> None:
    """Every token is there once, of one version."""
    for request, completion in zip(requests, completions, strict=True):
        n = request.sampling.max_tokens
        assert completion.finish == "length"
        assert len(completion.tokens) == len(completion.logprobs) == n and completion.versions == [version] * n
        assert all(logprob <= 0 for logprob in completion.logprobs)


def apart(one: Trainer, requests: list[Request], completions: list[Completion]) -> float:
    """Mean absolute difference of the log-probabilities that engine and trainer give the sampled tokens."""
    rows = [
        (request.tokens + completion.tokens, [0.0] * len(request.tokens) + [1.0] * len(completion.tokens))
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
