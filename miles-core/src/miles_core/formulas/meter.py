"""Numbers of micro-batches, updates and ranks, put together into those of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..types import Layout


class Meter:
    """Sums over the micro-batches of a step, as a mean over its updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self._sums: dict[str, torch.Tensor | float] = {}
        self.last: dict[str, float] = {}  # what every rank knows whole; the step's last one counts

    def add(self, name: str, value: torch.Tensor | float) -> None:
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        return {name: float(value) / self.updates for name, value in self._sums.items()} | self.last


def total(layouts: Sequence[Layout], teams: Sequence[Sequence[dict[str, float]]]) -> dict[str, float]:
    """Of every rank's answer: shares of means added up over the ranks that report; times and norms are the largest."""
    metrics: dict[str, float] = {}
    for answers in teams:
        reports = [answer for answer, layout in zip(answers, layouts, strict=True) if layout.reports]
        for name in reports[0]:
            values = [report[name] for report in reports]
            shared = name.startswith("time/") or name.endswith(("grad_norm", "lr"))
            metrics[name] = max([metrics.get(name, 0.0), *values]) if shared else sum(values)
    return metrics
