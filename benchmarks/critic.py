"""What a critic costs: a whole training step of PPO beside the forward and backward passes of its two models.

    python benchmarks/critic.py --updates 1 2 --out benchmarks/results/critic

One training rank in this process, the quickstart's model for both roles, random samples of its lengths. The step has
everything: columns, advantages, losses, both optimizers. Its median is compared with the sum of the medians of what
policy and critic take for a forward and a backward pass over the same micro-batches, measured in turns.

The first update's values and old log-probabilities come from its own passes. Those of later updates are of the models
that the step starts from, which the first update changes: they take a forward pass before it, of every row that is not
in the first update, and no order of the work saves it. What that pass takes is measured and shown beside the rest.
With ``--set batch.old_logprobs=engine`` the policy's is not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.loop.rank import TrainingRank
from miles_core.packing import count, distribute, pack
from miles_core.testing.reverse import write
from miles_core.types import Batch, Output, Role, Sample

HERE = Path(__file__).parent
RUN = HERE.parent / "examples" / "reverse" / "ppo.toml"
ROLES = ("policy", "critic")


def samples(number: int, tokens: int) -> list[Sample]:
    draw = random.Random(0)
    made = []
    for i in range(number):
        prompt = draw.randint(tokens // 4, tokens // 2)
        mask = [False] * prompt + [True] * (tokens - prompt)
        made.append(Sample(id=str(i), tokens=[draw.randrange(2, 20) for _ in mask], mask=mask))
        made[-1].logprobs = [-1.0 if m else 0.0 for m in mask]
        made[-1].versions = [0 if m else -1 for m in mask]
        made[-1].score = made[-1].reward = draw.random()
    return made


def passes(rank: TrainingRank, role: str, batches: list[Batch], backward: bool) -> float:
    """Seconds of a role's forward pass, and of a backward pass with a loss that costs nothing."""

    def loss(batch: Batch, output: Output) -> torch.Tensor:
        said = output.values if role == "critic" else output.logprobs
        assert said is not None
        return said.sum() / len(batch.tokens)

    began = time.perf_counter()
    if batches:
        rank._models[role].run(batches, rank._through(role), loss if backward else None)
    return time.perf_counter() - began


def built(keys: list[str]) -> tuple[TrainingRank, Any]:
    """A rank with both models, and the hooks of its run's driver."""
    driver = assemble(Source([RUN], keys)).registry("driver")
    roles: dict[str, Role] = {"policy": Role(trained=True)} | driver.roles()
    rank = TrainingRank(assemble(Source([RUN], keys)), 0, 1, roles, driver.columns())
    rank.build(rank.address())
    return rank, driver


def measure(rank: TrainingRank, driver: Any, updates: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians in seconds of a step and of its parts, which take turns."""
    made, payload = samples(options.samples, options.tokens), []
    for i in range(updates):
        units = [[sample] for sample in made[i::updates]]
        rows = [pack(row, driver.columns()) for row in distribute(units, 1, driver.run.batch.micro_tokens)[0]]
        payload.append([(rows, count(units))])
    batches = rank._batches(payload, None)
    flat, later = sum(batches, []), sum(batches[1:], [])
    times: dict[str, list[float]] = {}
    for i in range(options.repeats + 1):  # the first one warms up
        began = time.perf_counter()
        rank.train(1 + i, payload, None)
        found = {"step": time.perf_counter() - began}
        for role in ROLES:
            found[role] = sum(passes(rank, role, flat, True) for _ in range(options.epochs))
            found[f"{role}, later rows forward"] = passes(rank, role, later, False)
        for name, seconds in found.items() if i else ():
            times.setdefault(name, []).append(seconds)
    medians = {name: median(values) for name, values in times.items()}
    both = medians["policy"] + medians["critic"]
    needed = both + sum(medians[f"{role}, later rows forward"] for role in ROLES)
    tokens = sum(len(batch.tokens) for batch in flat)
    ratios = {"of forward and backward": medians["step"] / both, "of all passes": medians["step"] / needed}
    shape = {"updates": updates, "epochs": options.epochs, "micro-batches": len(flat), "tokens": tokens}
    return shape | {"median, s": medians, "step": ratios, "each, s": times}


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| updates x epochs | policy, both passes, ms | critic | later rows, forward | a step | of both models' passes "
        "| and of later rows' |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found:
        ms = {name: 1e3 * seconds for name, seconds in case["median, s"].items()}
        later = sum(ms[f"{role}, later rows forward"] for role in ROLES)
        two, every = case["step"]["of forward and backward"], case["step"]["of all passes"]
        lines.append(
            f"| {case['updates']} x {case['epochs']} | {ms['policy']:.0f} | {ms['critic']:.0f} | {later:.0f} "
            f"| {ms['step']:.0f} | {two:.3f} | {every:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 2], help="optimizer updates of a step")
    parser.add_argument("--epochs", type=int, default=1, help="passes over a step's samples")
    parser.add_argument("--set", action="append", default=[], help="a key of the run, such as ppo.kl=0.1")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(RUN.parent / "data")
    rank, driver = built([f"batch.epochs={options.epochs}", "batch.max_age=64", *options.set])
    load = os.getloadavg()[0]
    found = [measure(rank, driver, updates, options) for updates in options.updates]
    print(table(found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        told = {"settings": settings, "load": [load, os.getloadavg()[0]], "cases": found, "at": time.strftime("%F")}
        options.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        note = f"Medians of {options.repeats}, {found[0]['tokens']:,} tokens, one thread, load {load:.1f} at the start."
        options.out.with_suffix(".md").write_text(f"# What a critic costs\n\n{note}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
