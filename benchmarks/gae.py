"""Generalized advantage estimation over a million tokens, beside a Python loop over them.

    python benchmarks/gae.py

Both take the tensors that the hook has and give a tensor back, on the same ragged sequences, in turns; the medians of
their times are compared. The loop runs over lists made of the tensors: over elements of the tensors themselves, which
``--elements`` of the tokens are enough to tell, it is many times slower still.
"""

from __future__ import annotations

import argparse
import random
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--elements", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw, lengths = random.Random(0), []
    while sum(lengths) < options.tokens:
        lengths.append(draw.randint(1, 2048))
    n = sum(lengths)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values, rewards = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    case = values, rewards, torch.ones(n, dtype=torch.bool), seq, 0.99, 0.95
    ours, theirs = [], []
    for _ in range(options.repeats):
        for function, times in ((gae, ours), (loop, theirs)):
            began = time.perf_counter()
            function(*case)
            times.append(time.perf_counter() - began)
    furthest = (gae(*case) - loop(*case)).abs().max()
    few = tuple(x[: options.elements] for x in case[:4])
    began = time.perf_counter()
    backwards(*few, 0.99, 0.95)
    each = (time.perf_counter() - began) / options.elements
    mine, loops = median(ours), median(theirs)
    print(f"{n:,} tokens in {len(lengths)} sequences, {options.threads} thread, median of {options.repeats}")
    print(f"  vectorized            {1e3 * mine:9.1f} ms")
    print(f"  loop over lists       {1e3 * loops:9.1f} ms   {loops / mine:.1f} times as long")
    slowest = each * n / mine
    print(f"  loop over elements    {1e3 * each * n:9.1f} ms   {slowest:.0f} times as long, from {options.elements:,}")
    print(f"  they differ by {furthest:.1e} at most")


if __name__ == "__main__":
    main()
