"""Engine and trainer on one GPU: tokens per second, weights from one to the other, and how far they are apart."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from miles_core.edges.cluster.cluster import RayCluster
from miles_core.edges.cluster.session import Session
from miles_core.edges.http import IDLE_S
from miles_core.edges.protocols import Completion, Request, Sampling, Worker
from miles_core.edges.sglang import SGLang, wire
from miles_core.edges.sglang.client import SGLangClient
from miles_core.edges.sharing import HERE
from miles_core.packing import Packed

from .models import SHAPES, copy_seconds, forget, rank, run_of, write
from .table import Report, Row
from .training import Miles, packed

PROMPTS, PROMPT, TOKENS = 256, 32, 256
PAIRS, SYNCS = 5, 9
START_S = 240.0
BAR_ROLLOUT, BAR_SYNC_MS, BAR_APART = 0.97, 40.0, 0.01
LOCAL = {"address": "local", "object_store_memory": 256 << 20, "include_dashboard": False}


@asynccontextmanager
async def engine(plugin: SGLang, work: Path) -> AsyncIterator[Worker]:
    """The engine of a run, in a process of its own as the cluster starts it. It need not be ready yet."""
    [process] = plugin.miles_engines().processes
    cluster = RayCluster(Session(LOCAL | {"num_cpus": os.cpu_count()}), work / "cluster", 120)
    try:
        # Its GPU by number, where a run says whose GPU it shares: here the trainer is this process.
        yield await cluster.start(replace(process, gpus=1.0, beside=()))
    finally:
        await cluster.close()


def prompts(seed: int, vocab: int, count: int = PROMPTS) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(seed).integers(0, vocab, (count, PROMPT)).tolist()
    return drawn


def requests(ids: list[list[int]], tokens: int = TOKENS) -> list[Request]:
    """One of each prompt. Without stop tokens a response has exactly ``tokens``."""
    return [Request(f"{i}/0", prompt, Sampling(tokens), seed=i) for i, prompt in enumerate(ids)]


# -- tokens per second -----------------------------------------------------------------------------------------------


async def rollout(client: SGLangClient, worker: Worker, vocab: int, pairs: int = PAIRS, size: int = PROMPTS) -> Row:
    """Through Miles' client and router, and by one plain call, in turns; the cache of prefixes is empty each time."""
    url, _ = wire.parts_of(await worker.call("address"))
    fresh = aiohttp.TCPConnector(keepalive_timeout=IDLE_S)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(), connector=fresh) as plain:

        async def through(ids: list[list[int]]) -> int:
            return sum(len(completion.tokens) for completion in await client.generate(requests(ids)))

        async def bare(ids: list[list[int]]) -> int:
            sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}
            body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
            async with plain.post("/generate", json=body) as reply:
                return sum(len(one["output_ids"]) for one in await reply.json())

        async def rate(way: Any, ids: list[list[int]]) -> float:
            async with plain.post("/flush_cache", raise_for_status=True):
                pass
            began = time.perf_counter()
            written = await way(ids)
            return float(written / (time.perf_counter() - began))

        taken = []
        for pair in range(pairs + 1):
            ids = prompts(pair, vocab, size)
            ways = (through, bare) if pair % 2 else (bare, through)
            rates = {way: await rate(way, ids) for way in ways}
            if pair:  # the first one warms up
                taken.append((rates[through], rates[bare]))
    mine, theirs = (statistics.median(side) for side in zip(*taken, strict=True))
    ratio = statistics.median(own / other for own, other in taken)
    return Row(
        "rollout",
        f"rollout, {size} prompts of {PROMPT} tokens x {TOKENS} tokens",
        mine,
        "tokens/s",
        theirs,
        "one /generate call",
        ratio,
        f"at least {BAR_ROLLOUT}",
        ratio >= BAR_ROLLOUT,
        f"medians of {pairs} pairs, log-probabilities on both sides",
    )


# -- how far apart ---------------------------------------------------------------------------------------------------


def as_row(asked: list[Request], said: list[Completion]) -> Packed:
    """What was sampled as one micro-batch, with the engine's log-probabilities."""
    lengths = np.array([len(r.tokens) + len(c.tokens) for r, c in zip(asked, said, strict=True)], dtype=np.int64)
    pairs = list(zip(asked, said, strict=True))
    none = np.zeros(len(asked), dtype=np.float32)
    return Packed(
        tokens=np.array([t for r, c in pairs for t in r.tokens + c.tokens], dtype=np.int64),
        mask=np.concatenate([np.arange(len(r.tokens) + len(c.tokens)) >= len(r.tokens) for r, c in pairs]),
        lengths=lengths,
        logprobs=np.array([x for r, c in pairs for x in [0.0] * len(r.tokens) + c.logprobs], dtype=np.float32),
        score=none,
        reward=none,
        unit=np.arange(len(asked)),
        columns={},
    )


def trainer_apart(miles: Miles, rows: list[Packed]) -> float:
    """Mean |log-probability of the trainer - of the engine| over the sampled tokens."""
    where = next(miles.model.module.parameters()).device
    batches = [row.to_batch({"token": 1, "sample": 1, "unit": 1}, 1.0, where) for row in rows]
    outputs = miles.model.run(batches, miles.forward, None)
    gaps = [((o.logprobs - b.rollout_logprobs).abs() * b.mask).sum() for o, b in zip(outputs, batches, strict=True)]
    return float(sum(gaps)) / sum(int(row.mask.sum()) for row in rows)


@torch.no_grad()
def transformers_apart(folder: Path, asked: list[Request], said: list[Completion], dtype: torch.dtype) -> float:
    """The same of transformers; sequences of one length go through it eight at a time."""
    from transformers import AutoModelForCausalLM

    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(where).eval()
    total = tokens = 0.0
    for start in range(0, len(asked), 8):
        some = list(zip(asked, said, strict=True))[start : start + 8]
        ids = torch.tensor([r.tokens + c.tokens for r, c in some], device=where)
        told = torch.tensor([c.logprobs for _, c in some], device=where)
        logits = model(ids).logits[:, -told.shape[1] - 1 : -1].float()
        found = logits.log_softmax(-1).gather(2, ids[:, -told.shape[1] :, None])[..., 0]
        total, tokens = total + float((found - told).abs().sum()), tokens + told.numel()
    del model
    forget()
    return total / tokens


async def logprobs(client: SGLangClient, miles: Miles, folder: Path, vocab: int) -> Row:
    asked = requests(prompts(99, vocab, 64))
    said = await client.generate(asked)
    if {version for completion in said for version in completion.versions} != {0}:
        raise ValueError("the engine does not serve the weights on disk")
    mine = trainer_apart(miles, [as_row(asked[i : i + 16], said[i : i + 16]) for i in range(0, 64, 16)])
    theirs = transformers_apart(folder, asked, said, torch.bfloat16)
    return Row(
        "logprobs",
        "mean |log-probability, trainer - rollout|, step 0, bf16",
        mine,
        "",
        theirs,
        "transformers in bf16",
        mine / theirs,
        f"under {BAR_APART}",
        mine < BAR_APART,
        f"64 responses of {TOKENS} tokens",
    )


# -- weights ---------------------------------------------------------------------------------------------------------


async def sync(
    client: SGLangClient, worker: Worker, miles: Miles, transport: Any, vocab: int, first: int, kept: bool
) -> Row:
    """As a step of a colocated run moves weights: the engine makes room, the trainer trains while the engine stops for
    the update, the weights move.

    Timed are the making room and, after the training, everything until the engine serves: what is left of its stopping
    too. Either both keep their memory all along, or each gives it up for the other; ``first`` is the first version.
    """
    transport.connect([worker], miles.model.layout)
    assert miles.model._turns  # it shares its GPU with the engine
    parts, size, last = [], 0.0, first + SYNCS + 1
    for version in range(first, last + 1):
        began = time.perf_counter()
        await worker.call("sleep")
        asleep = time.perf_counter() - began
        # As the loop does, which need not know of sleep.
        stopping = asyncio.ensure_future(worker.call("begin_update", version))
        await asyncio.to_thread(_train, miles, [packed([8192], vocab, version)])
        began = time.perf_counter()
        server = await stopping
        stops = time.perf_counter()
        HERE.trained = kept  # without a training to go by the engine does not stay
        miles.model._turns.rest()  # which ``export`` would do
        rests = time.perf_counter()
        size = transport.send(miles.model.export(), verify=False, servers=[server])["bytes"]
        sent = time.perf_counter()
        await worker.call("end_update")
        parts.append((asleep, stops - began, rests - stops, sent - rests, time.perf_counter() - sent))
    [completion] = await client.generate(requests(prompts(7, vocab, 1), 8))
    if set(completion.versions) != {last}:
        raise ValueError(f"the engine serves version {completion.versions}, not {last}")
    if HERE.stays != kept:
        raise ValueError(
            f"memory is {'kept' if HERE.stays else 'given up'} in the syncs that were to show the opposite"
        )
    parts = parts[2:]  # the first one allocates the buckets, and only then it is known whether both fit
    whole = statistics.median(sum(part) for part in parts) * 1e3
    told = [f"{1e3 * statistics.median(side):.1f}" for side in zip(*parts, strict=True)]
    best = copy_seconds(int(size)) * 1e3
    return Row(
        "sync",
        f"weight sync, colocated, {size / 1e9:.2f} GB, memory {'kept' if kept else 'given up'}, everything included",
        whole,
        "ms",
        best,
        "device-to-device copy",
        whole / best,
        f"under {BAR_SYNC_MS:g} ms" if kept else "",
        whole < BAR_SYNC_MS if kept else None,
        f"medians of {SYNCS}: the engine makes room {told[0]}, stops behind the training {told[1]}, trainer rests "
        f"{told[2]}, weights {told[3]}, serves again {told[4]} ms",
    )


def _train(miles: Miles, rows: list[Packed]) -> None:
    miles.step(rows)
    torch.cuda.synchronize()


async def measure(names: list[str], work: Path, table: dict[str, Any], report: Report) -> None:
    folder, vocab = write(work, "0.6B"), SHAPES["0.6B"].vocab
    run = run_of(folder, "colocate", rollout={"timeout_s": START_S})
    plugin = SGLang(SGLang.Config(**{"mem_fraction_static": 0.4} | table), run)
    async with engine(plugin, work) as worker:
        miles = Miles(run, "local")  # while the server starts
        async with asyncio.timeout(START_S):
            print(await worker.call("ready"), flush=True)
        client = SGLangClient([worker], START_S)
        if "rollout" in names:
            report(await rollout(client, worker, vocab))
        if "logprobs" in names:  # before any other weights arrive
            report(await logprobs(client, miles, folder, vocab))
        if "sync" in names:
            transport = plugin.miles_transport()
            for i, kept in enumerate((True, False)):
                report(await sync(client, worker, miles, transport, vocab, 1 + i * (SYNCS + 2), kept))
            transport.close()


def job(names: list[str], work: Path, table: dict[str, Any], report: Report) -> None:
    """The rows "rollout", "logprobs" and "sync", with one server."""
    with rank():
        asyncio.run(measure(names, work, table, report))
