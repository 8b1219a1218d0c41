"""Ragged sequences twice over: packed, as the plugin gets them, and padded [B, L], as papers write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from miles_core.config import RunConfig
from miles_core.types import Batch, Output
from miles_plugin_grpo import GRPO
from torch import Tensor

MAX_TOKENS = 16

# The same examples on every machine, and no deadline: a busy machine is no failure.
examples = settings(max_examples=40, derandomize=True, deadline=None)


def plugin(*, group_size: int = 8, **keys: Any) -> GRPO:
    tables = {"model": {"path": "model"}, "rollout": {"max_tokens": MAX_TOKENS}, "batch": {"group_size": group_size}}
    return GRPO(GRPO.Config.model_validate(keys), RunConfig.model_validate({"algorithm": "grpo"} | tables))


@dataclass
class Padded:
    """[B, L] float64, zero where nothing is trained; ``advantage`` [B, 1]."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    entropy: Tensor
    mask: Tensor
    advantage: Tensor


class Case:
    """Sequences of random numbers; ``masks`` says of each which tokens are trained on."""

    FIELDS = ("logprobs", "old", "ref", "entropy")

    def __init__(self, masks: Sequence[Sequence[bool]], seed: int, spread: float = 0.4, dtype: Any = torch.float64):
        draw = torch.Generator().manual_seed(seed)
        self.masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
        self.scores = torch.randn(len(masks), generator=draw, dtype=torch.float64).to(dtype)
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.FIELDS}
        for mask in self.masks:
            logprobs = -torch.rand(len(mask), generator=draw, dtype=torch.float64) * 3
            noise = spread * torch.randn(2, len(mask), generator=draw, dtype=torch.float64)
            entropy = torch.rand(len(mask), generator=draw, dtype=torch.float64)
            values = (logprobs, logprobs + noise[0], logprobs + noise[1], entropy)
            for name, value in zip(self.FIELDS, values, strict=True):
                self.rows[name].append((value * mask).to(dtype))
        self.counts = {"token": max(sum(int(m.sum()) for m in self.masks), 1), "sample": max(len(masks), 1), "unit": 1}

    def padded(self) -> Padded:
        def pad(rows: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        fields = {name: pad(rows) for name, rows in self.rows.items()}
        for name in ("logprobs", "entropy"):
            fields[name].requires_grad_()
        mask = pad([m.to(self.scores.dtype) for m in self.masks])
        return Padded(**fields, mask=mask, advantage=self.scores[:, None])

    def packed(self, which: Sequence[int] | None = None) -> tuple[Batch, Output]:
        """The sequences ``which``, in that order, as one micro-batch of this update."""
        which = range(len(self.masks)) if which is None else which
        dtype = self.scores.dtype

        def cat(rows: Sequence[Tensor], of: Any = dtype) -> Tensor:
            return torch.cat([rows[i] for i in which]) if which else torch.empty(0, dtype=of)

        lengths = torch.tensor([len(self.masks[i]) for i in which], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        seq = torch.repeat_interleave(torch.arange(len(which)), lengths)
        scores = self.scores[list(which)]
        batch = Batch(
            tokens=torch.zeros(len(seq), dtype=torch.int64),
            mask=cat(self.masks, torch.bool),
            starts=starts.int(),
            seq=seq,
            positions=torch.arange(len(seq)) - starts[seq],
            rollout_logprobs=cat(self.rows["old"]),
            old_logprobs=cat(self.rows["old"]),
            score=scores,
            reward=scores,
            unit=torch.arange(len(which)),
            temperature=1.0,
            counts=self.counts,
            columns={"advantage": scores[seq], "ref_logprobs": cat(self.rows["ref"])},
        )
        output = Output(
            logprobs=cat(self.rows["logprobs"]).requires_grad_(), entropy=cat(self.rows["entropy"]).requires_grad_()
        )
        return batch, output

    def unpad(self, x: Tensor) -> Tensor:
        """[B, L] -> [T], as ``packed()`` orders it."""
        return torch.cat([row[: len(mask)] for row, mask in zip(x, self.masks, strict=True)])


def total(grpo: GRPO, batch: Batch, output: Output) -> Tensor:
    """What the loop descends: the loss and its penalties, each over its global count."""
    loss = grpo.miles_loss(role="policy", batch=batch, output=output)
    terms = [loss, *grpo.miles_penalty(role="policy", batch=batch, output=output).values()]
    return torch.stack([term.sum / batch.counts[term.per] for term in terms]).sum()


# The first token of a sequence is never trained on; tokens in between may be a tool's, hence not the policy's.
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=9).map(lambda m: [False, *m]), min_size=1, max_size=7)
cases = st.builds(Case, masks, st.integers(0, 2**31))
