"""The rollout worker: prompts in, scored groups out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from importlib import import_module

from ..edges.protocols import Engine, EngineError, Worker
from ..plugins import Manifest
from ..samples import check_reward, check_rollout, numbered
from ..types import Group, Refused


@dataclass(slots=True)
class Rolled:
    """A group that a worker is done with: whole, or failed by an engine."""

    id: int
    group: Group | None
    error: str = ""
    sampled: float = 0.0  # seconds from its beginning until sampled
    done: float = 0.0  # and until rewarded
    ended: float = 0.0  # when, in seconds since the epoch


class RolloutWorker:
    """One process that keeps many groups in flight at once."""

    def __init__(self, manifest: Manifest, engines: list[Worker], client: str) -> None:
        self._hooks = manifest.registry("rollout")
        module, _, name = client.partition(":")
        self._run, self._client = self._hooks.run, getattr(import_module(module), name)
        self._rolling: set[asyncio.Task[Rolled]] = set()
        self._done: asyncio.Queue[asyncio.Task[Rolled]] = asyncio.Queue()
        self.connect(engines)
        self._hooks.rollout_start()

    def connect(self, engines: list[Worker]) -> None:
        """Sample from these from now on."""
        self._engine: Engine = self._client(engines, self._run.rollout.timeout_s)

    async def begin(self, groups: list[Group]) -> None:
        """Consumes groups of one sample, the prompt; ``collect`` produces them whole, sampled and rewarded."""
        for group in groups:
            task = asyncio.ensure_future(self._tried(numbered(group, self._run.batch.group_size, self._run.seed)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # one that is raised is enough
            task.add_done_callback(self._done.put_nowait)
            self._rolling.add(task)  # the event loop itself keeps no strong reference

    async def collect(self) -> list[Rolled]:
        """Whatever is done by now, at least one. Raises what a rollout or a reward raised."""
        done = [await self._done.get()]
        done += [self._done.get_nowait() for _ in range(self._done.qsize())]
        self._rolling.difference_update(done)
        return sorted((task.result() for task in done), key=lambda rolled: rolled.id)

    async def evaluate(self, groups: list[Group]) -> list[Group]:
        """Consumes groups of held-out prompts; produces them whole. Raises EngineError where an engine failed one."""
        attempts = 1 if self._run.placement.engines else self._run.batch.group_size  # all of the responses given
        tasks = [asyncio.ensure_future(self._one(numbered(group, attempts, self._run.seed), True)) for group in groups]
        try:
            return [rolled.group for rolled in await asyncio.gather(*tasks) if rolled.group]
        finally:
            for task in tasks:
                task.cancel()

    async def _tried(self, group: Group) -> Rolled:
        try:
            return await self._one(group, False)
        except EngineError as error:
            return Rolled(group.id, None, str(error))

    async def _one(self, group: Group, evaluating: bool) -> Rolled:
        began = time.perf_counter()
        group = await self._hooks.rollout(group=group, engine=self._engine, evaluating=evaluating)
        sampled = time.perf_counter() - began
        for sample in group.samples:
            check_rollout(sample)
        named: dict[str, list[float]] = await self._hooks.reward(group=group, evaluating=evaluating)
        if not named and self._run.placement.engines:
            raise Refused("nobody gives rewards: add a [reward.NAME] table or a plugin that answers miles_reward")
        for name, values in named.items():
            check_reward(name, values, group)
        for i, sample in enumerate(group.samples):
            sample.rewards = {name: float(values[i]) for name, values in named.items()}
            sample.reward = sum(sample.rewards.values())
        return Rolled(group.id, group, "", sampled, time.perf_counter() - began, time.time())
