"""What a critic costs: a whole training step of PPO beside the forward and backward passes of its two models.

    python benchmarks/critic.py

One training rank in this process, the quickstart's model for both roles, random samples of its lengths. The step has
everything: columns, advantages, losses, both optimizers. Its median is compared with the sum of the medians of what
policy and critic take for a forward and a backward pass over the same micro-batches, measured in turns.
"""

from __future__ import annotations

import argparse
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


def passes(rank: TrainingRank, role: str, batches: list[Batch]) -> float:
    """Seconds of one forward and backward pass of a role, with a loss that costs nothing."""

    def loss(batch: Batch, output: Output) -> torch.Tensor:
        said = output.values if role == "critic" else output.logprobs
        assert said is not None
        return said.sum() / len(batch.tokens)

    began = time.perf_counter()
    rank._models[role].run(batches, rank._through(role), loss)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--set", action="append", default=[], help="a key of the run, such as ppo.kl=0.1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(RUN.parent / "data")
    manifest = assemble(Source([RUN], options.set))
    driver = manifest.registry("driver")
    roles: dict[str, Role] = {"policy": Role(trained=True)} | driver.roles()
    rank = TrainingRank(manifest, 0, 1, roles, driver.columns())
    rank.build(rank.address())
    units = [[sample] for sample in samples(options.samples, options.tokens)]
    rows = [pack(row, driver.columns()) for row in distribute(units, 1, driver.run.batch.micro_tokens)[0]]
    payload: Any = [[(rows, count(units))]]
    batches = rank._batches(payload, None)[0]
    steps, policy, critic = [], [], []
    for i in range(options.repeats + 1):
        began = time.perf_counter()
        rank.train(1 + i, payload, None)
        steps.append(time.perf_counter() - began)
        policy.append(passes(rank, "policy", batches))
        critic.append(passes(rank, "critic", batches))
    step, one, other = (median(times[1:]) for times in (steps, policy, critic))
    print(f"{len(batches)} micro-batches, {sum(len(b.tokens) for b in batches):,} tokens, median of {options.repeats}")
    print(f"  policy, forward and backward {1e3 * one:8.1f} ms")
    print(f"  critic, forward and backward {1e3 * other:8.1f} ms")
    print(f"  a step with both             {1e3 * step:8.1f} ms   {step / (one + other):.3f} of their sum")


if __name__ == "__main__":
    main()
