"""Rewards into advantages, on the driver: one number a sample, the same for all its tokens.

Plain Python, because a step has hundreds of numbers and a tensor operation costs more than all of them.
R is a sample's reward, G the size of its group. A group of one has nothing to be compared with: its advantage is 0, or
with ``alone`` its reward as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles_core.types import Group

    from .config import Config


def centered(rewards: list[float], alone: bool = False) -> list[float]:
    """``R - mean(R)``: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section "Dr. GRPO").

    >>> centered([1.0, 0.0, 0.0, 0.0])
    [0.75, -0.25, -0.25, -0.25]
    >>> centered([3.0]), centered([3.0], alone=True)
    ([0.0], [3.0])
    """
    mean = 0.0 if alone and len(rewards) == 1 else math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def deviation(rewards: list[float]) -> float:
    """The unbiased standard deviation, over n - 1; 0 of a single one.

    >>> deviation([1.0, 0.0, 0.0, 0.0]), deviation([3.0])
    (0.5, 0.0)
    """
    gaps = centered(rewards)
    return math.sqrt(math.fsum(map(mul, gaps, gaps)) / max(len(gaps) - 1, 1))


def standardized(rewards: list[float], eps: float, alone: bool = False, spread: float | None = None) -> list[float]:
    """``(R - mean(R)) / (std(R) + eps)``: GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    The paper does not say which standard deviation; this is the unbiased one, over G - 1, as everywhere in the field.
    ``spread`` stands in its place where it is that of all rewards of a step.

    >>> standardized([1.0, 0.0, 0.0, 0.0], eps=0.25)
    [1.0, -0.3333333333333333, -0.3333333333333333, -0.3333333333333333]
    >>> standardized([1.0, 0.0], eps=0.0, spread=2.0)
    [0.25, -0.25]
    """
    if len(rewards) == 1:
        return centered(rewards, alone)
    scale = (deviation(rewards) if spread is None else spread) + eps
    return [gap / scale for gap in centered(rewards)]


def leave_one_out(rewards: list[float], alone: bool = False) -> list[float]:
    """``R`` minus the mean of the *other* rewards, which is ``(R - mean(R)) G / (G - 1)``: RLOO (Ahmadian et al. 2024,
    arXiv:2402.14740, the RLOO estimator; Kool et al. 2019).

    >>> leave_one_out([1.0, 0.0, 0.0, 0.0])
    [1.0, -0.3333333333333333, -0.3333333333333333, -0.3333333333333333]
    """
    factor = len(rewards) / max(len(rewards) - 1, 1)
    return [gap * factor for gap in centered(rewards, alone)]


def whitened(
    rewards: list[list[float]], lengths: list[list[int]], eps: float, alone: bool = False
) -> list[list[float]]:
    """``(A - mean(A)) / (std(A) + eps)`` with ``A = R - mean(R)`` of the group; mean and deviation of A are over every
    trained token of the step: REINFORCE++ w/ baseline (Hu et al. 2025, arXiv:2501.03262).

    ``lengths`` are the samples' trained tokens: each of them carries its sample's A, so a long sample weighs more.
    By hand, with A = (1, -1) on one and three tokens: the mean is -0.5, the variance (2.25 + 3 * 0.25) / 3 = 1.

    >>> whitened([[2.0, 0.0]], [[1, 3]], eps=0.0)
    [[1.5, -0.5]]
    """
    gaps = [centered(group, alone) for group in rewards]
    weighed = [(gap, n) for group, ns in zip(gaps, lengths, strict=True) for gap, n in zip(group, ns, strict=True)]
    total = sum(n for _, n in weighed)
    mean = math.fsum(gap * n for gap, n in weighed) / max(total, 1)
    scale = math.sqrt(math.fsum((gap - mean) ** 2 * n for gap, n in weighed) / max(total - 1, 1)) + eps
    return [[(gap - mean) / scale for gap in group] for group in gaps]


def scores(groups: list[Group], config: Config) -> list[list[float]]:
    """The advantages of the samples of one step, group by group."""
    rewards = [group.rewards for group in groups]
    eps, alone = config.std_eps or 0.0, config.alone == "reward"
    if config.advantage == "reinforce_pp_baseline":
        return whitened(rewards, [[sample.mask.count(True) for sample in g.samples] for g in groups], eps, alone)
    spread = deviation([reward for group in rewards for reward in group]) if config.std == "batch" else None
    each: dict[str, Callable[[list[float]], list[float]]] = {
        "grpo": lambda group: standardized(group, eps, alone, spread),
        "dr_grpo": lambda group: centered(group, alone),
        "rloo": lambda group: leave_one_out(group, alone),
    }
    return [each[config.advantage](group) for group in rewards]
