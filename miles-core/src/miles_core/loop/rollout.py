"""The rollout worker: prompts in, scored groups out."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from importlib import import_module

from ..edges.protocols import Engine, Worker
from ..plugins import Manifest
from ..types import Group, Refused, Sample


class RolloutWorker:
    """One process that keeps many groups in flight at once."""

    def __init__(self, manifest: Manifest, engines: list[Worker], client: str) -> None:
        self._hooks = manifest.registry("rollout")
        module, _, name = client.partition(":")
        self._run = self._hooks.run
        self._engine: Engine = getattr(import_module(module), name)(engines, self._run.rollout.timeout_s)
        self._hooks.rollout_start()

    async def roll(self, groups: list[Group], evaluating: bool) -> tuple[list[Group], dict[str, float]]:
        """Consumes groups of one sample, the prompt; produces them whole, sampled and rewarded, and the wall seconds.

        Rewarding counts from the moment that nothing is sampling any more. Raises what a rollout or a reward raised;
        the other groups are then given up.
        """
        sampled: list[float] = []
        began = time.perf_counter()
        sampled_once = evaluating and self._run.placement.engines  # given responses are always looked at all together
        attempts = 1 if sampled_once else self._run.batch.group_size
        whole = (numbered(group, attempts, self._run.seed) for group in groups)
        tasks = [asyncio.ensure_future(self._one(group, evaluating, sampled)) for group in whole]
        try:
            done = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return done, {"sample": max(sampled) - began, "reward": time.perf_counter() - max(sampled)}

    async def _one(self, group: Group, evaluating: bool, sampled: list[float]) -> Group:
        group = await self._hooks.rollout(group=group, engine=self._engine, evaluating=evaluating)
        sampled.append(time.perf_counter())
        for sample in group.samples:
            _check_rollout(sample)
        named: dict[str, list[float]] = await self._hooks.reward(group=group, evaluating=evaluating)
        if not named and self._run.placement.engines:
            raise Refused("nobody gives rewards: add a [reward.NAME] table or a plugin that answers miles_reward")
        for name, values in named.items():
            _check_reward(name, values, group)
        for i, sample in enumerate(group.samples):
            sample.rewards = {name: float(values[i]) for name, values in named.items()}
            sample.reward = sum(sample.rewards.values())
        return group


def _check_rollout(sample: Sample) -> None:
    size = len(sample.tokens)
    for what in ("mask", "logprobs", "versions"):
        if (have := len(getattr(sample, what))) != size:
            raise Refused(f"sample {sample.id}: the rollout gave {size} tokens but {have} {what}")
    if size and sample.mask[0]:
        raise Refused(f"sample {sample.id}: its first token cannot be trained on, nothing comes before it")
    if not all(map(math.isfinite, sample.logprobs)):
        raise Refused(f"sample {sample.id}: the engine gave a log-probability that is not finite")


def _check_reward(name: str, values: list[float], group: Group) -> None:
    if len(values) != len(group.samples):
        raise Refused(f"reward {name}, group {group.id}: {len(values)} values for {len(group.samples)} samples")
    for value, sample in zip(values, group.samples, strict=True):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(f"reward {name}, sample {sample.id}: {value!r} is not a finite number")


def numbered(group: Group, attempts: int, seed: int) -> Group:
    """``attempts`` copies of the group's prompt, each with its id and its own seed, the same wherever resumed."""
    [prompt] = group.samples

    def attempt(i: int) -> Sample:
        drawn = int.from_bytes(hashlib.blake2b(f"{seed}/{group.id}/{i}".encode(), digest_size=7).digest())
        return Sample(prompt.prompt, dict(prompt.info), f"{group.id}/{i}", drawn, list(prompt.tokens))

    return Group(group.id, [attempt(i) for i in range(attempts)])
