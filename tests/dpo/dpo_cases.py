"""Pairs of ragged sequences twice over: packed, as the plugin gets them, and padded [P, L], as papers write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from miles_core.config import RunConfig
from miles_core.packing import count, pack
from miles_core.types import Batch, Group, Output, Sample
from miles_plugin_dpo import DPO
from torch import Tensor

EXACT = {"rtol": 1e-9, "atol": 1e-12}

# The same examples on every machine, and no deadline: a busy machine is no failure.
examples = settings(max_examples=40, derandomize=True, deadline=None)


def run(**tables: Any) -> RunConfig:
    base = {"algorithm": "dpo", "model": {"path": "model"}, "rollout": {"max_tokens": 16}}
    return RunConfig.model_validate(base | tables)


def plugin(*, tables: dict[str, Any] | None = None, **keys: Any) -> DPO:
    return DPO(DPO.Config.model_validate(keys), run(**(tables or {"batch": {"group_size": 2}})))


def complaints(algorithm: Any, responses: Sequence[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    data = {"data": SimpleNamespace(responses=list(responses))}
    algorithm.miles_check(lambda *fault: found.append(fault), data)
    return found


@dataclass
class Side:
    """[P, L] float64 of one side of every pair; zero where nothing is trained."""

    logprobs: Tensor
    ref: Tensor
    mask: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """[P], log p(y) where ``rows`` are log-probabilities of tokens."""
        return (rows * self.mask).sum(1)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1).clip(min=1)


class Case:
    """Pairs of random numbers; ``masks`` says of each, chosen then rejected, which tokens are trained on."""

    def __init__(self, masks: Sequence[tuple[Sequence[bool], Sequence[bool]]], seed: int, dtype: Any = torch.float64):
        draw = torch.Generator().manual_seed(seed)
        self.dtype, self.samples = dtype, []
        self.said: dict[str, tuple[Tensor, Tensor]] = {}  # log-probabilities of policy and reference, by sample
        for i, pair in enumerate(masks):
            for j, mask in enumerate(pair):
                trained = torch.tensor(mask, dtype=torch.float64)
                logprobs = -torch.rand(len(mask), generator=draw, dtype=torch.float64) * 3 * trained
                noise = 0.4 * torch.randn(len(mask), generator=draw, dtype=torch.float64) * trained
                self.said[f"{i}/{j}"] = logprobs.to(dtype), (logprobs + noise).to(dtype)
                self.samples.append(
                    Sample(id=f"{i}/{j}", tokens=[0] * len(mask), mask=list(mask), logprobs=[0.0] * len(mask),
                           versions=[-1] * len(mask), score=1.0 - j)
                )  # fmt: skip
        self.units = [self.samples[i : i + 2] for i in range(0, len(self.samples), 2)]
        self.counts = count(self.units)

    def padded(self) -> tuple[Side, Side]:
        def pad(rows: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        sides = []
        for j in range(2):
            said = [self.said[f"{i}/{j}"] for i in range(len(self.units))]
            mask = pad([torch.tensor(unit[j].mask, dtype=torch.float64) for unit in self.units])
            sides.append(Side(pad([p for p, _ in said]).requires_grad_(), pad([r for _, r in said]), mask))
        return sides[0], sides[1]

    def packed(self, units: Sequence[Sequence[Sample]] | None = None) -> tuple[Batch, Output]:
        """``units``, in that order, as one micro-batch of this update."""
        units = self.units if units is None else units
        batch = pack([list(unit) for unit in units], {}).to_batch(self.counts, 1.0, "cpu")
        said = [self.said[sample.id] for unit in units for sample in unit]
        nothing = torch.empty(0, dtype=self.dtype)
        batch.columns["ref_logprobs"] = torch.cat([nothing, *(r for _, r in said)])
        logprobs = torch.cat([nothing, *(p for p, _ in said)]).requires_grad_()
        return batch, Output(logprobs=logprobs, entropy=torch.zeros_like(logprobs))


def total(algorithm: Any, batch: Batch, output: Output) -> Tensor:
    """What the loop descends: the loss and its penalties, each over its global count."""
    loss = algorithm.miles_loss(role="policy", batch=batch, output=output)
    terms = [loss]
    if hasattr(algorithm, "miles_penalty"):
        terms += algorithm.miles_penalty(role="policy", batch=batch, output=output).values()
    return torch.stack([term.sum / batch.counts[term.per] for term in terms]).sum()


def attempts(rewards: Sequence[float], id: int = 0, versions: Sequence[int] = (-1, 3)) -> Group:
    """A prompt's attempts by an engine."""
    return Group(id, [
        Sample(id=f"{id}/{i}", tokens=[0, 1], mask=[False, True], versions=list(versions), reward=reward)
        for i, reward in enumerate(rewards)
    ])  # fmt: skip


# A prompt's tokens are never trained on, and each side has one token at least.
side = st.lists(st.booleans(), max_size=8).map(lambda m: [False, *m, True])
masks = st.lists(st.tuples(side, side), min_size=1, max_size=6)
cases = st.builds(Case, masks, st.integers(0, 2**31))
