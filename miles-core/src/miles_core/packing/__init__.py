"""Units of samples into packed rows, the same number of rows for every data-parallel rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import Per, Sample

if TYPE_CHECKING:
    from ..types import Batch, Column, Group, Layout

Unit = list[Sample]


@dataclass(slots=True)
class Packed:
    """A ``Batch`` in numpy, on its way to the ranks: S sequences laid end to end over T tokens."""

    tokens: np.ndarray[Any, Any]  # [T] int64
    mask: np.ndarray[Any, Any]  # [T] bool
    lengths: np.ndarray[Any, Any]  # [S] int64
    logprobs: np.ndarray[Any, Any] | None  # [T] float32; None where no engine drew the tokens
    score: np.ndarray[Any, Any]  # [S] float32
    reward: np.ndarray[Any, Any]  # [S] float32
    unit: np.ndarray[Any, Any]  # [S] int64
    columns: dict[str, np.ndarray[Any, Any]]  # [T] float32 each

    def to_batch(self, counts: dict[Per, int], temperature: float, device: Any) -> Batch:
        import torch

        from ..types import Batch

        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        seq = np.repeat(np.arange(len(self.lengths)), self.lengths)
        rows: dict[str, Any] = {"tokens": self.tokens, "mask": self.mask, "starts": starts.astype(np.int32), "seq": seq}
        rows |= {"positions": np.arange(len(seq)) - starts[seq]}
        rows |= {"score": self.score, "reward": self.reward, "unit": self.unit}
        tensors, columns = (
            {name: torch.from_numpy(x).to(device) for name, x in arrays.items()} for arrays in (rows, self.columns)
        )
        logprobs = None if self.logprobs is None else torch.from_numpy(self.logprobs).to(device)
        return Batch(
            **tensors,
            rollout_logprobs=logprobs,
            old_logprobs=None,
            temperature=temperature,
            counts=counts,
            columns=columns,
            host=self,
        )


def count(units: Sequence[Unit]) -> dict[Per, int]:
    """The denominators of one update, over all ranks and micro-batches; at least 1, so that nothing divides by 0."""
    samples = [sample for unit in units for sample in unit]
    tokens = sum(sum(sample.mask) for sample in samples)
    return {"token": max(tokens, 1), "sample": max(len(samples), 1), "unit": max(len(units), 1)}


def distribute(units: Sequence[Unit], ranks: int, budget: int) -> list[list[list[Unit]]]:
    """For each rank its micro-batches, each a list of units: as even in tokens as whole units allow.

    Longest first: every unit goes to the rank with the fewest tokens, then there to the first micro-batch with room.
    A unit longer than ``budget`` tokens gets a micro-batch of its own. Ranks that need fewer get empty ones, because
    every rank must take part in every collective.
    """
    sizes = [sum(len(sample.tokens) for sample in unit) for unit in units]
    load = [(0, rank) for rank in range(ranks)]
    rows: list[list[list[Unit]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(units)), key=lambda i: -sizes[i]):
        tokens, rank = heapq.heappop(load)
        heapq.heappush(load, (tokens + sizes[i], rank))
        fits = next((row for row, left in enumerate(room[rank]) if left >= sizes[i]), None)
        if fits is None:
            rows[rank].append([units[i]])
            room[rank].append(budget - sizes[i])
        else:
            rows[rank][fits].append(units[i])
            room[rank][fits] -= sizes[i]
    most = max(map(len, rows))
    return [mine + [[] for _ in range(max(most, 1) - len(mine))] for mine in rows]


def pack(units: Sequence[Unit], columns: dict[str, Column], drawn: bool = True) -> Packed:
    """One micro-batch, which an engine has ``drawn`` or not. Only columns that a rollout records are filled here."""
    samples = [sample for unit in units for sample in unit]

    def flat(lists: list[Any], dtype: Any) -> np.ndarray[Any, Any]:
        return np.array([x for xs in lists for x in xs], dtype=dtype)

    recorded = {name: column for name, column in columns.items() if column.role is None}
    return Packed(
        tokens=flat([s.tokens for s in samples], np.int64),
        mask=flat([s.mask for s in samples], np.bool_),
        lengths=np.array([len(s.tokens) for s in samples], dtype=np.int64),
        logprobs=flat([s.logprobs for s in samples], np.float32) if drawn else None,
        score=np.array([s.score for s in samples], dtype=np.float32),
        reward=np.array([s.reward for s in samples], dtype=np.float32),
        unit=np.array([i for i, unit in enumerate(units) for _ in unit], dtype=np.int64),
        columns={
            name: flat([s.columns.get(name) or [column.pad] * len(s.tokens) for s in samples], np.float32)
            for name, column in recorded.items()
        },
    )


def exchange(layouts: Sequence[Layout], teams: list[list[list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
    """Every team's columns, by rank and micro-batch, put together by data-parallel rank and micro-batch."""
    given: list[list[dict[str, Any]]] = [[] for _ in range(layouts[0].dp_size)]
    for team in teams:
        for layout, rows in zip(layouts, team, strict=True):
            if layout.reports:
                have = given[layout.dp_rank] or [{} for _ in rows]
                given[layout.dp_rank] = [mine | more for mine, more in zip(have, rows, strict=True)]
    return given


def deal(groups: list[Group], n: int, units: Callable[..., list[Unit]]) -> list[list[Unit]]:
    """The groups' samples that have a score, as ``units(group=...)``, dealt into ``n`` updates by whole groups."""
    dealt: list[list[Unit]] = []
    for i in range(n):
        parts = [unit for group in groups[i::n] for unit in units(group=group)]
        kept = [[sample for sample in unit if sample.score is not None] for unit in parts]
        dealt.append([unit for unit in kept if unit])
    return dealt
