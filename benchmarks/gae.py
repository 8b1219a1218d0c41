"""Generalized advantage estimation over a million tokens, beside a Python loop over them.

    python benchmarks/gae.py --out benchmarks/results/gae

"A Python loop" is what the equations say, written over the tensors that the hook has, from the last token to the first.
``--elements`` of the tokens are looped over, and the time is told for all of them: it does the same for each.

Beside it stands a loop that knows that: it makes lists of the tensors first, and a tensor of the list that it made. All
take the tensors and give a tensor back, on the same ragged sequences, in turns; medians of their times are compared.
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
from miles_plugin_ppo.gae import gae
from torch import Tensor


def loop(values: Tensor, rewards: Tensor, mask: Tensor, seq: Tensor, gamma: float, lam: float) -> Tensor:
    """Eqs. 11 and 16 of arXiv:1506.02438, token by token from the last one."""
    lists = [x.tolist() for x in (values, rewards, mask, seq)]
    return torch.tensor(backwards(*lists, gamma, lam))


def backwards(values: Any, rewards: Any, mask: Any, seq: Any, gamma: float, lam: float) -> list[Any]:
    found = [0.0] * len(values)
    following = advantage = 0.0
    last = -1
    for t in range(len(values) - 1, -1, -1):
        if seq[t] != last:
            following = advantage = 0.0
            last = seq[t]
        if mask[t]:
            advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
            found[t], following = advantage, values[t]
    return found


def elements(values: Tensor, rewards: Tensor, mask: Tensor, seq: Tensor, gamma: float, lam: float) -> Tensor:
    """The same, over the elements of the tensors."""
    return torch.stack([torch.as_tensor(x) for x in backwards(values, rewards, mask, seq, gamma, lam)])


def table(found: dict[str, Any]) -> str:
    mine = found["median, s"]["vectorized"]
    rows = [f"| {name} | {1e3 * s:,.1f} | {s / mine:,.1f} |" for name, s in found["median, s"].items()]
    return "\n".join(["| over the same tokens | ms | times as long |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--elements", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw, lengths = random.Random(0), []
    while sum(lengths) < options.tokens:
        lengths.append(draw.randint(1, 2048))
    n = sum(lengths)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values, rewards = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    case = values, rewards, torch.ones(n, dtype=torch.bool), seq, 0.99, 0.95
    few = tuple(x[: options.elements] for x in case[:4])
    load, times = os.getloadavg()[0], {name: list[float]() for name in ("vectorized", "elements", "lists")}
    for _ in range(options.repeats):
        for name, function, given in (("vectorized", gae, case), ("elements", elements, few), ("lists", loop, case)):
            began = time.perf_counter()
            function(*given[:4], 0.99, 0.95)
            times[name].append(time.perf_counter() - began)
    whole = {name: median(seconds) for name, seconds in times.items()}
    whole["elements"] *= n / len(few[0])
    furthest = float((gae(*case) - loop(*case)).abs().max())
    names = {"vectorized": "vectorized", "elements": "a loop over elements of tensors", "lists": "a loop over lists"}
    found = {"tokens": n, "sequences": len(lengths), "median, s": {names[key]: whole[key] for key in names}}
    found |= {"each, s": times, "differ by": furthest, "load": load, "at": time.strftime("%F")}
    note = (
        f"{n:,} tokens in {len(lengths)} sequences, {options.threads} thread, median of {options.repeats}, load "
        f"{load:.1f}; the loop over elements told from {len(few[0]):,}. They differ by {furthest:.1e} at most."
    )
    print(f"{note}\n\n{table(found)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.with_suffix(".json").write_text(json.dumps({"settings": settings} | found, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(f"# Advantages of a million tokens\n\n{note}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
