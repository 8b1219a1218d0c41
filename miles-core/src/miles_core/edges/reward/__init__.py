"""Rewards by name: each ``[reward.NAME]`` table is one number a sample, and a sample's reward is their weighted sum.

Unweighted values stay in ``sample.info["raw_rewards"]``, for evaluation. A scorer that raises or runs over its budget
stops the run, unless its table says ``on_error = "fail"``: ``failure_value`` takes its place, the reason is kept in
``sample.info["failed_rewards"]`` and the share of failures is reported as ``reward/failed/NAME``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, model_validator

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Refused
from .kinds import Base, Http, Scorer

if TYPE_CHECKING:
    from ...types import Complain, Group
    from .http import Remote
    from .kinds import Outcome
    from .pool import Pool


class RewardError(Refused):
    """A scorer failed on a sample; the message names both."""


class Reward(Plugin):
    class Config(Plugin.Config):
        """Tables of scorers, each under the name it is reported by; ``workers`` is how many processes score at most."""

        model_config = ConfigDict(extra="allow", frozen=True)
        __pydantic_extra__: dict[str, Scorer]

        workers: int = Field(4, gt=0)  # of one rollout worker; the second starts only when the first is not enough

        @model_validator(mode="before")
        @classmethod
        def _kind_is_the_name(cls, tables: Any) -> Any:
            if not isinstance(tables, dict):
                return tables
            return {
                name: {"kind": name} | table if isinstance(table, dict) else table for name, table in tables.items()
            }

        @property
        def scorers(self) -> dict[str, Base]:
            return dict(self.model_extra or {})

        @property
        def columns(self) -> dict[str, str]:
            """The columns of the data that scorers cannot do without, and the key that names each."""
            return {s.answer: f"reward.{name}.answer" for name, s in self.scorers.items() if s.needs_answer}

    config: Config
    _pool: Pool | None = None
    _remotes: dict[str, Remote] | None = None

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        for name, scorer in self.config.scorers.items():
            if fault := scorer.fault():
                complain(f"reward.{name}.{fault[0]}", fault[1])

    @hookimpl
    def miles_rollout_start(self) -> None:
        """A process that scores starts now: what it imports must not count against a sample's budget."""
        local = {name: scorer for name, scorer in self.config.scorers.items() if not isinstance(scorer, Http)}
        if local:
            from .pool import Pool

            self._pool = Pool(local, self.config.workers, self.run.rollout.max_tokens)

    @hookimpl
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        """Raises RewardError, naming reward and sample."""
        import asyncio  # here, since `miles plugins` is quicker without

        scorers = self.config.scorers
        asked = [asyncio.ensure_future(self._score(name, scorer, group)) for name, scorer in scorers.items()]
        try:
            outcomes = await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
        raw = {name: self._values(name, found, group) for name, found in zip(scorers, outcomes, strict=True)}
        for i, sample in enumerate(group.samples):
            sample.info["raw_rewards"] = {name: values[i] for name, values in raw.items()}
        return {name: [scorers[name].weight * value for value in values] for name, values in raw.items()}

    async def _score(self, name: str, scorer: Base, group: Group) -> list[Outcome]:
        if isinstance(scorer, Http):
            from .http import Remote

            self._remotes = self._remotes or {}
            if name not in self._remotes:  # not sooner: it belongs to the event loop that uses it
                self._remotes[name] = Remote(scorer)
            return await self._remotes[name].score(group.samples)
        if self._pool is None:
            self.miles_rollout_start()
        assert self._pool is not None
        return await self._pool.score(name, scorer, group)

    def _values(self, name: str, outcomes: list[Outcome], group: Group) -> list[float]:
        scorer, values = self.config.scorers[name], []
        for (value, error), sample in zip(outcomes, group.samples, strict=True):
            if value is None:
                if scorer.on_error == "stop":
                    hint = f'; reward.{name}.on_error = "fail" would count it and go on'
                    raise RewardError(f"reward {name}, sample {sample.id}: {error}{hint}")
                sample.info.setdefault("failed_rewards", {})[name] = error
                value = scorer.failure_value
            values.append(value)
        return values

    @hookimpl
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        samples = [sample for group in groups for sample in group.samples]
        prefix = "eval" if evaluating else "reward"
        return {
            f"{prefix}/failed/{name}": sum(name in s.info.get("failed_rewards", ()) for s in samples) / len(samples)
            for name, scorer in self.config.scorers.items()
            if scorer.on_error == "fail"
        }
