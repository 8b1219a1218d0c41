"""Packed batches from lists of token lists, as the loop packs them."""

import torch
from miles_core.types import Batch


def pack(sequences: list[list[int]], weights: list[list[float]], temperature: float = 1.0) -> Batch:
    """A row of ``sequences``; tokens with a weight other than 0 are trained on, and find it in the column "weight"."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    seq = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    weight = torch.tensor([w for ws in weights for w in ws], dtype=torch.float32)
    nothing, none = torch.zeros(len(tokens)), torch.zeros(len(sequences))
    return Batch(
        tokens=tokens,
        mask=weight != 0,
        starts=starts.int(),
        seq=seq,
        positions=torch.arange(len(tokens)) - starts[seq],
        rollout_logprobs=nothing,
        old_logprobs=None,
        score=none,
        reward=none,
        unit=torch.arange(len(sequences)),
        temperature=temperature,
        counts={"token": 1, "sample": 1, "unit": 1},
        columns={"weight": weight},
    )
