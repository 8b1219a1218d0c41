"""Tokens per second of the local engine beside ``transformers`` ``generate``: same model, same batch, one thread.

    python benchmarks/engine.py --out benchmarks/engine

writes ``engine.json`` and ``engine.md``. The two take turns, pair after pair, so that whatever else the machine does
falls on both; the numbers are medians. Both run on one thread, so CPU time is a second opinion, less disturbed by
neighbours than the clock is. ``transformers`` runs as fast as it can be made to run here: a dynamic cache
(a static one was slower without compiling), nothing returned but tokens. The engine returns log-probabilities and
versions too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from miles_core.edges.local.server import LocalEngine
from miles_core.edges.protocols import Request, Sampling
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

VOCAB = 256


@dataclass(frozen=True)
class Case:
    name: str
    hidden: int
    layers: int
    prompts: int  # different ones
    attempts: int  # at each
    prompt_tokens: int
    max_tokens: int
    stop_tokens: int  # how many of the vocabulary's tokens end a response: on random weights, lengths vary
    bar: float  # least ratio that is good enough


CASES = (
    Case("0.5M parameters", 128, 2, 64, 1, 16, 32, 0, 1.3),
    Case("4M parameters", 256, 4, 64, 1, 16, 32, 0, 1.05),
    Case("0.5M, groups of 16 share a prompt of 64, lengths vary", 128, 2, 4, 16, 64, 128, 8, 2.0),
    Case("4M, groups of 16 share a prompt of 64, lengths vary", 256, 4, 4, 16, 64, 128, 8, 2.0),
)


@dataclass(frozen=True)
class Result:
    case: Case
    parameters: int
    engine_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float  # of speeds, median over pairs
    cpu_ratio: float  # the same, by CPU time
    pairs: int


def build(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=case.hidden // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def prompts_of(case: Case) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(VOCAB, (case.prompts, case.prompt_tokens), generator=generator)
    return [row for row in drawn.tolist() for _ in range(case.attempts)]


def engine_run(case: Case, folder: Path) -> Callable[[int], int]:
    engine = LocalEngine(str(folder), None, case.prompts * case.attempts, 1024)
    sampling = Sampling(case.max_tokens, stop_tokens=tuple(range(case.stop_tokens)))

    def run(seed: int) -> int:
        requests = [
            Request(str(i), prompt, sampling, seed=seed * 1000 + i) for i, prompt in enumerate(prompts_of(case))
        ]
        return sum(len(completion.tokens) for completion in asyncio.run(engine.generate(requests)))

    return run


def transformers_run(case: Case, model: PreTrainedModel) -> Callable[[int], int]:
    stops = list(range(case.stop_tokens))
    ids = torch.tensor(prompts_of(case))
    options = dict(max_new_tokens=case.max_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=stops or None, **options
            )
        written = out[:, case.prompt_tokens :]
        if not stops:
            return written.numel()
        stopped = torch.isin(written, torch.tensor(stops))
        before = stopped.cumsum(1) - stopped.long() == 0  # tokens up to and with the first that stops
        return int(before.sum())

    return run


def measure(case: Case, pairs: int) -> Result:
    model = build(case)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = engine_run(case, Path(folder))
    theirs = transformers_run(case, model)
    for run in (ours, theirs):
        run(0)
    taken: list[list[tuple[float, float]]] = []
    for pair in range(1, pairs + 1):
        first, second = (ours, theirs) if pair % 2 else (theirs, ours)
        both = [timed(first, pair), timed(second, pair)]
        taken.append(both if pair % 2 else both[::-1])
    return Result(
        case,
        sum(p.numel() for p in model.parameters()),
        statistics.median(speed for (speed, _), _ in taken),
        statistics.median(speed for _, (speed, _) in taken),
        statistics.median(mine / other for (mine, _), (other, _) in taken),
        statistics.median(mine / other for (_, mine), (_, other) in taken),
        pairs,
    )


def timed(run: Callable[[int], int], seed: int) -> tuple[float, float]:
    """Tokens per second of wall time, and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run(seed)
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def machine() -> dict[str, str | int]:
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "machine": f"{platform.machine()} {capability}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def table(results: list[Result], where: dict[str, str | int]) -> str:
    lines = [
        "# The local engine beside transformers",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items()) + f"; medians of {results[0].pairs} pairs.",
        "",
        "| case | parameters | batch | engine, tokens/s | transformers, tokens/s | ratio | by CPU time | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        batch = f"{r.case.prompts} x {r.case.attempts}, {r.case.prompt_tokens} + up to {r.case.max_tokens} tokens"
        lines.append(
            f"| {r.case.name} | {r.parameters:,} | {batch} | {r.engine_tokens_per_s:,.0f} "
            f"| {r.transformers_tokens_per_s:,.0f} | {r.ratio:.2f} | {r.cpu_ratio:.2f} | {r.case.bar} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = [measure(case, args.pairs) for case in CASES]
    where = machine()
    print(text := table(results, where), end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(result) for result in results]
        args.out.with_suffix(".json").write_text(json.dumps({"machine": where, "results": rows}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
