"""What a checkpoint costs the training: written behind it, beside one that is waited for.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint

writes ``checkpoint.json`` and ``checkpoint.md``. Training ranks on Ray as in any run, a Qwen3 with random weights, the
loss of the SFT example, a driver that does nothing else. The two ways take turns, pair after pair, with steps without
a checkpoint between them. For each way the table says how long the ranks were kept from training, and by how much the
steps that ran beside the writing took longer than the median step, all of them together. Checksums and pruning are part
of the writing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from miles_core.edges.lasting import RunState, Store
from miles_core.edges.protocols import everyone
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.loop.fleet import Fleet, start
from miles_core.testing.reverse import write
from miles_core.types import Sample

HERE = Path(__file__).parent
RUN = HERE.parent / "examples" / "reverse" / "sft.toml"


@dataclass(frozen=True)
class Case:
    name: str
    hidden: int
    layers: int
    ranks: int
    samples: int  # a step, of 128 tokens


CASES = (
    Case("54M parameters, 1 rank", 512, 12, 1, 8),
    Case("54M parameters, 2 ranks", 512, 12, 2, 16),
    Case("99M parameters, 1 rank", 640, 16, 1, 8),
)


@dataclass
class Result:
    """Seconds; a value a pair."""

    case: Case
    parameters: int
    gigabytes: float
    first: float = 0.0  # the first save, whose memory may not be ready
    plain: list[float] = field(default_factory=list)  # steps without a checkpoint
    waited: list[float] = field(default_factory=list)  # the stall of one that is waited for
    stalls: list[float] = field(default_factory=list)  # the stall of one behind training
    lasted: list[float] = field(default_factory=list)  # until that one was whole
    slower: list[float] = field(default_factory=list)  # that its steps took longer, together


def model(case: Case, folder: Path) -> int:
    """Write a Qwen3 with the tokenizer of the example; returns how many parameters it has."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shutil.copytree(RUN.parent / "data" / "model", folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 128,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    net = Qwen3ForCausalLM(config)
    net.save_pretrained(folder)
    return sum(p.numel() for p in net.parameters())


def units(case: Case) -> list[list[Sample]]:
    draw, made = random.Random(0), []
    for i in range(case.samples):
        mask = [False] * 32 + [True] * 96
        sample = Sample(id=str(i), tokens=[draw.randrange(2, 32_000) for _ in mask], mask=mask)
        sample.logprobs, sample.versions = [0.0] * 128, [-1] * 128
        sample.score = sample.reward = 1.0
        made.append([sample])
    return made


class Bench:
    def __init__(self, fleet: Fleet, store: Store, payload: Any) -> None:
        self.fleet, self.store, self.payload = fleet, store, payload
        self.count = 0

    async def step(self) -> float:
        began = time.perf_counter()
        self.count += 1
        await self.fleet.train(self.count, self.payload)
        return time.perf_counter() - began

    async def save(self) -> tuple[float, asyncio.Task[float]]:
        """How long the ranks were kept, and what ends, with its own time, when the checkpoint is whole."""
        folder = self.store.begin(self.count)
        began = time.perf_counter()
        await everyone(self.fleet.trainers, "save", str(folder))
        stall = time.perf_counter() - began

        async def rest() -> float:
            await everyone(self.fleet.trainers, "saved")
            await asyncio.to_thread(self.store.commit, folder, RunState(step=self.count))
            return time.perf_counter() - began

        return stall, asyncio.ensure_future(rest())

    async def pair(self, result: Result) -> None:
        result.plain.append(await self.step())
        _, writing = await self.save()
        result.waited.append(await writing)
        result.plain += [await self.step() for _ in range(2)]
        stall, writing = await self.save()
        beside = []
        while not writing.done():
            beside.append(await self.step())
        result.stalls.append(stall)
        result.lasted.append(await writing)
        result.plain.append(await self.step())
        result.slower.append(sum(beside) - len(beside) * median(result.plain[-4:]))


async def measure(case: Case, pairs: int) -> Result:
    runs = HERE.parent / "runs"  # on a disk, and where git does not look: one that is killed leaves it there
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as temporary:
        folder = Path(temporary)
        result = Result(case, model(case, folder / "model"), 0.0)
        settings = [f"model.path={folder / 'model'}", f"placement.trainers={case.ranks}", "placement.engines=0"]
        settings += ["eval.every=0", "checkpoint.every=1", "checkpoint.keep=1", "batch.micro_tokens=512"]
        settings += [f"batch.groups={case.samples}", f"run_dir={folder / 'run'}"]
        manifest = assemble(Source([RUN], settings))
        hooks = manifest.registry("driver")
        store: Store = hooks.store(run_dir=folder / "run")
        store.claim(False)
        cluster = hooks.cluster(run_dir=folder / "run")
        try:
            fleet = await start(manifest, hooks, cluster)
            payload = await fleet.share([units(case)], hooks.run.batch.micro_tokens)
            bench = Bench(fleet, store, payload)
            for _ in range(2):
                await bench.step()
            result.first, writing = await bench.save()
            await writing
            for _ in range(pairs):
                await bench.pair(result)
        finally:
            await cluster.close()
        whole = next((folder / "run" / "checkpoints").glob("step-*"))
        result.gigabytes = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) / 1e9
    return result


def table(results: list[Result], pairs: int) -> str:
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    lines = [
        "# Checkpoints behind training",
        "",
        f"{where}; medians of {pairs} pairs, in seconds; the share of a step in parentheses.",
        "",
        "| case | GB | step | stall, waited for | stall, behind | first stall | until whole | its steps slower by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        step = median(r.plain)
        waited, stall, slower = median(r.waited), median(r.stalls), median(r.slower)
        lines.append(
            f"| {r.case.name} | {r.gigabytes:.2f} | {step:.2f} | {waited:.2f} ({waited / step:.0%}) "
            f"| {stall:.3f} ({stall / step:.1%}) | {r.first:.3f} | {median(r.lasted):.2f} "
            f"| {slower:.2f} ({slower / step:.0%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(CASES)), help="numbers of the cases, from 0")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    write(RUN.parent / "data")
    results = [asyncio.run(measure(CASES[i], options.pairs)) for i in options.only]
    print(text := table(results, options.pairs), end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(result) for result in results]
        options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
