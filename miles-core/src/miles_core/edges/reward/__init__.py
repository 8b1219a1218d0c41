"""Rewards by name: each ``[reward.NAME]`` table is one number a sample, and a sample's reward is their weighted sum.

Unweighted values stay in ``sample.info["raw_rewards"]``, for evaluation. A scorer that raises or runs over its budget
stops the run, unless its table says ``on_error = "fail"``: ``failure_value`` takes its place, the reason is kept in
``sample.info["failed_rewards"]`` and the share of failures is reported as ``reward/failed/NAME``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, model_validator

from ...config import suggest
from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Refused
from .kinds import KINDS, Scorer

if TYPE_CHECKING:
    from ...types import Complain, Group
    from .pool import Outcome, Pool


class RewardError(Refused):
    """A scorer failed on a sample; the message names both."""


class Reward(Plugin):
    class Config(Plugin.Config):
        """Tables of scorers, each under the name it is reported by; ``workers`` is how many processes score."""

        model_config = ConfigDict(extra="allow", frozen=True)
        __pydantic_extra__: dict[str, Scorer]

        workers: int = Field(1, gt=0)

        @model_validator(mode="before")
        @classmethod
        def _kind_is_the_name(cls, tables: Any) -> Any:
            if not isinstance(tables, dict):
                return tables
            named = {k: {"kind": k} | t if isinstance(t, dict) else t for k, t in tables.items()}
            for name, table in named.items():
                if isinstance(table, dict) and table["kind"] not in KINDS:
                    hint = suggest(str(table["kind"]), KINDS) or f"; there are {', '.join(KINDS)}"
                    raise ValueError(f"{name}: no such kind of reward: {table['kind']!r}{hint}")
            return named

        @property
        def scorers(self) -> dict[str, Scorer]:
            return dict(self.model_extra or {})

    config: Config
    _pool: Pool | None = None

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        for name, scorer in self.config.scorers.items():
            if fault := scorer.fault():
                complain(f"reward.{name}.{fault[0]}", fault[1])

    @hookimpl
    def miles_rollout_start(self) -> None:
        """Processes that score start now: what they import must not count against a sample's budget."""
        from .pool import Pool

        local: dict[str, Scorer] = {n: s for n, s in self.config.scorers.items() if s.kind != "http"}
        if local:
            self._pool = Pool(local, self.config.workers, self.run.rollout.max_tokens)

    @hookimpl
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        scorers = self.config.scorers
        outcomes = await asyncio.gather(*(self._score(name, scorer, group) for name, scorer in scorers.items()))
        raw = {name: self._values(name, found, group) for name, found in zip(scorers, outcomes, strict=True)}
        for i, sample in enumerate(group.samples):
            sample.info["raw_rewards"] = {name: values[i] for name, values in raw.items()}
        return {name: [scorers[name].weight * value for value in values] for name, values in raw.items()}

    async def _score(self, name: str, scorer: Scorer, group: Group) -> list[Outcome]:
        if scorer.kind == "http":
            from .http import ask

            return await ask(scorer, group.samples)
        if self._pool is None:
            self.miles_rollout_start()
        assert self._pool is not None
        return await self._pool.score(name, scorer, group.samples)

    def _values(self, name: str, outcomes: list[Outcome], group: Group) -> list[float]:
        scorer, values = self.config.scorers[name], []
        if len(outcomes) != len(group.samples):
            raise RewardError(f"reward {name}, group {group.id}: {len(outcomes)} values, {len(group.samples)} samples")
        for (value, error), sample in zip(outcomes, group.samples, strict=True):
            if error is None and (isinstance(value, bool | int | float) and math.isfinite(value)):
                values.append(float(value))
                continue
            why = error or f"gave {value!r}, which is not a finite number"
            if scorer.on_error == "stop":
                raise RewardError(f'reward {name}, sample {sample.id}: {why}; on_error = "fail" would count it instead')
            sample.info.setdefault("failed_rewards", {})[name] = why
            values.append(scorer.failure_value)
        return values

    @hookimpl
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        samples = [sample for group in groups for sample in group.samples]
        prefix = "eval" if evaluating else "reward"
        return {
            f"{prefix}/failed/{name}": _share(name in sample.info.get("failed_rewards", ()) for sample in samples)
            for name, scorer in self.config.scorers.items()
            if scorer.on_error == "fail"
        }


def _share(flags: Iterable[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed)
