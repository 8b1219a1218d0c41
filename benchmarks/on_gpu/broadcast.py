"""Weights from a trainer on one GPU to an engine on another, beside a bare NCCL broadcast of the same bytes."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from itertools import pairwise
from math import inf
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from miles_core.edges.protocols import Worker
from miles_core.edges.sglang import SGLang
from miles_core.edges.sglang.client import SGLangClient

from .models import SHAPES, rank, run_of, write
from .serving import START_S, engine, prompts, requests
from .table import Report, Row
from .training import Miles

SYNCS = 5
SMALL = 2**16  # elements: norms alone
BUCKETS_MIB = (512, 2048)  # the first is what a run takes unless it is told otherwise
BAR = 0.8
ENDING_S = 20.0  # for one process of a broadcast, once the other is done


def bare(number: int, meeting: str, size: int, result: Any) -> None:
    """One of two processes that broadcast ``size`` bytes; the median seconds go into ``result``."""
    torch.cuda.set_device(number)
    gpu = torch.device("cuda", number)
    dist.init_process_group("nccl", init_method=meeting, rank=number, world_size=2, device_id=gpu)
    tensor = torch.zeros(size, dtype=torch.uint8, device=gpu)
    took = []
    for _ in range(SYNCS + 2):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.broadcast(tensor, 0)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    if not number:
        result.value = statistics.median(took[2:])
    dist.destroy_process_group()


def bare_seconds(size: int) -> float:
    fresh = get_context("spawn")
    result = fresh.Value("d", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        both = [fresh.Process(target=bare, args=(i, f"file://{folder}/meeting", size, result)) for i in range(2)]
        for process in both:
            process.start()
        wait([process.sentinel for process in both])  # one that fails leaves the other waiting
        for process in both:
            process.join(ENDING_S)
            process.kill()
            process.join()
    if any(process.exitcode for process in both):
        raise RuntimeError("the bare broadcast failed")
    return float(result.value)


async def measure(work: Path, table: dict[str, Any], report: Report) -> None:
    folder, vocab = write(work, "4B"), SHAPES["4B"].vocab
    run = run_of(folder, "split", rollout={"timeout_s": START_S})
    plugin = SGLang(SGLang.Config(**{"cuda_graph_max_bs_decode": 8} | table), run)  # it hardly generates
    bare = bare_seconds(sum(file.stat().st_size for file in folder.glob("*.safetensors")))  # while GPUs are free
    async with engine(plugin, work) as worker:
        miles = Miles(run, "local")
        async with asyncio.timeout(START_S):
            await worker.call("ready")
        version = 0
        for mib in BUCKETS_MIB:
            transport = SGLang(SGLang.Config(**table | {"bucket_mib": mib}), run).miles_transport()
            transport.connect([worker], miles.model.layout)
            parts, size, least = [], 0.0, []
            for _ in range(SYNCS + 1):
                version += 1
                parts_of, size = await sync(worker, miles, transport, version)
                parts.append(parts_of)
            for _ in range(SYNCS):
                version += 1
                least.append((await sync(worker, miles, transport, version, most=SMALL))[0])
            [completion] = await SGLangClient([worker], START_S).generate(requests(prompts(7, vocab, 1), 8))
            if set(completion.versions) != {version}:
                raise ValueError(f"the engine serves version {completion.versions}, not {version}")
            transport.close()
            # The first one makes the group and the buckets.
            report(_row(mib, parts[1:], size, size / bare, least))


async def sync(
    worker: Worker, miles: Miles, transport: Any, version: int, most: float = inf
) -> tuple[tuple[float, ...], float]:
    """Seconds until the engine stands still, is told of the weights, those of at most so many elements, has them and
    serves again; and the bytes. Nothing of it is behind anything else."""
    torch.cuda.synchronize()
    at = [time.perf_counter()]
    server = await worker.call("begin_update", version)
    at.append(time.perf_counter())
    named = (pair for pair in miles.model.export() if pair[1].numel() <= most)
    size = transport.send(named, verify=False, servers=[server])["bytes"]
    at.append(time.perf_counter())
    await worker.call("end_update")
    torch.cuda.synchronize()  # by then they were sent
    at.append(time.perf_counter())
    return tuple(after - before for before, after in pairwise(at)), size


def _row(mib: int, parts: list[tuple[float, ...]], size: float, best: float, least: list[tuple[float, ...]]) -> Row:
    stops, moves, serves = (1e3 * statistics.median(side) for side in zip(*parts, strict=True))
    behind = size / statistics.median(sum(each[1:]) for each in parts)  # as overlapped and in turns
    whole = size / statistics.median(map(sum, parts))
    norms = (1e3 * statistics.median(map(sum, (each[first:] for each in least))) for first in (1, 0))
    return Row(
        "nccl",
        f"weight sync, two GPUs, NCCL, {size / 1e9:.1f} GB in buckets of {mib:,} MiB, from the end of a training until "
        "the engine serves",
        behind / 1e9,
        "GB/s",
        best / 1e9,
        "bare NCCL broadcast",
        behind / best,
        f"at least {BAR}",
        behind / best >= BAR,
        f"medians of {SYNCS}: weights on their way {moves:.1f}, there and served {serves:.1f} ms; behind the training "
        f"the engine stops, {stops:.1f}; as in mode async, where it stops for it, {whole / 1e9:.0f} GB/s, "
        f"{whole / best:.3f}; with norms alone {' and '.join(f'{each:.1f}' for each in norms)} ms",
    )


def job(work: Path, table: dict[str, Any], report: Report) -> None:
    """The row "nccl". The engine gets the first GPU, so the trainer takes the second."""
    with rank(gpu=1):
        asyncio.run(measure(work, table, report))
