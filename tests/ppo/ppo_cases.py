"""Ragged sequences of random numbers, packed as the plugin gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from miles_core.config import RunConfig
from miles_core.types import Batch, Mean, Output
from miles_plugin_ppo import PPO
from torch import Tensor

MAX_TOKENS = 16
EXACT = {"rtol": 1e-9, "atol": 1e-12}

# The same examples on every machine, and no deadline: a busy machine is no failure.
examples = settings(max_examples=40, derandomize=True, deadline=None)


def plugin(*, run: dict[str, Any] | None = None, **keys: Any) -> PPO:
    tables = {"algorithm": "ppo", "model": {"path": "model"}, "rollout": {"max_tokens": MAX_TOKENS}}
    return PPO(PPO.Config.model_validate(keys), RunConfig.model_validate(tables | (run or {})))


class Case:
    """``masks`` says of each sequence which tokens are trained on; off it stands what nothing may look at."""

    FIELDS = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "values", "new_values", "advantage", "returns")

    def __init__(self, masks: Sequence[Sequence[bool]], seed: int, dtype: Any = torch.float64):
        draw = torch.Generator().manual_seed(seed)
        self.masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
        self.scores = torch.randn(len(masks), generator=draw, dtype=torch.float64).to(dtype)
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.FIELDS}
        for mask in self.masks:
            for name in self.FIELDS:
                noise = torch.randn(len(mask), generator=draw, dtype=torch.float64)
                self.rows[name].append((0.4 * noise * (mask if "logprobs" in name else 1.0)).to(dtype))
        tokens = sum(int(m.sum()) for m in self.masks)
        self.counts = {"token": max(tokens, 1), "sample": max(len(masks), 1), "unit": max(len(masks), 1)}

    def packed(self, which: Sequence[int] | None = None) -> tuple[Batch, Output]:
        """The sequences ``which``, in that order, as one micro-batch of this update."""
        which = range(len(self.masks)) if which is None else which
        dtype = self.scores.dtype

        def cat(rows: Sequence[Tensor], of: Any = dtype) -> Tensor:
            return torch.cat([rows[i] for i in which]) if which else torch.empty(0, dtype=of)

        lengths = torch.tensor([len(self.masks[i]) for i in which], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        seq = torch.repeat_interleave(torch.arange(len(which)), lengths)
        columns = ("ref_logprobs", "values", "advantage", "returns")
        batch = Batch(
            tokens=torch.zeros(len(seq), dtype=torch.int64),
            mask=cat(self.masks, torch.bool),
            starts=starts.int(),
            seq=seq,
            positions=torch.arange(len(seq)) - starts[seq],
            rollout_logprobs=cat(self.rows["old_logprobs"]),
            old_logprobs=cat(self.rows["old_logprobs"]),
            score=self.scores[list(which)],
            reward=self.scores[list(which)],
            unit=torch.arange(len(which)),
            temperature=1.0,
            counts=self.counts,
            columns={name: cat(self.rows[name]) for name in columns},
        )
        new = [cat(self.rows[name]).requires_grad_() for name in ("logprobs", "entropy", "new_values")]
        return batch, Output(logprobs=new[0], entropy=new[1], values=new[2])

    def cut(self, x: Tensor) -> list[Tensor]:
        """[T], as ``packed()`` orders it, by sequence."""
        return list(x.split([len(mask) for mask in self.masks]))


def total(ppo: PPO, role: str, batch: Batch, output: Output) -> Tensor:
    """What the loop descends: the loss and its penalties, each over its global count."""
    loss = ppo.miles_loss(role=role, batch=batch, output=output)
    terms = [loss, *ppo.miles_penalty(role=role, batch=batch, output=output).values()]
    return torch.stack([term.sum / batch.counts[term.per] for term in terms]).sum()


def means(metrics: dict[str, Mean], counts: dict) -> dict[str, float]:
    return {name: float(mean.sum) / counts[mean.per] for name, mean in metrics.items()}


# The first token of a sequence is never trained on; tokens in between may be a tool's, hence not the policy's.
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=40).map(lambda m: [False, *m]), min_size=1, max_size=7)
cases = st.builds(Case, masks, st.integers(0, 2**31))
