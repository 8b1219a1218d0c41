"""The processes of a run, started together and asked together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..edges.protocols import Cluster, EngineError, Engines, Process, TransportError, Worker, WorkerDied, everyone
from ..formulas.meter import total
from ..pacing import moved
from ..packing import Unit, count, distribute, exchange, pack
from ..plugins import Manifest, Registry
from ..types import Column, Group, Layout, Role

TRIES = 4  # to move weights, before the last
ROLLOUT, RANK = "miles_core.loop.rollout:RolloutWorker", "miles_core.loop.rank:TrainingRank"


@dataclass(slots=True)
class Fleet:
    cluster: Cluster
    ranks: list[Worker]
    layouts: list[Layout]
    engines: list[Worker]
    rollouts: list[Worker]
    apart: list[list[Worker]]  # the teams of roles that have ranks of their own, as many as ``ranks``
    columns: dict[str, Column]
    turns: bool  # engines give their memory to the trainers for the length of a step's training
    manifest: Manifest
    spec: Engines  # from which those that die are started again
    asked: int = 0  # the last step that the ranks were asked to train
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)  # until every rank is asked to train
    healing: asyncio.Lock = field(default_factory=asyncio.Lock)
    pushing: asyncio.Lock = field(default_factory=asyncio.Lock)
    replaced: list[tuple[str, str]] = field(default_factory=list)  # engines nobody was told of yet, and why

    @property
    def trainers(self) -> list[Worker]:
        return [*self.ranks, *(worker for team in self.apart for worker in team)]

    async def evaluate(self, groups: list[Group]) -> list[Group]:
        """Sample and reward held-out prompts, split evenly over the rollout workers."""
        share = -(-len(groups) // len(self.rollouts))
        asked = zip(self.rollouts, (groups[i : i + share] for i in range(0, len(groups), share)), strict=False)
        answers = await asyncio.gather(*(worker.call("evaluate", part) for worker, part in asked))
        return [group for part in answers for group in part]

    async def share(self, updates: list[list[Unit]], budget: int) -> Any:
        """A step's updates, packed for the data-parallel ranks, where every rank can read them."""
        size, payload = self.layouts[0].dp_size, []
        samples = [sample for units in updates for unit in units for sample in unit]
        drawn = not samples or any(max(sample.versions, default=-1) >= 0 for sample in samples)
        for units in updates:
            counts, rows = count(units), distribute(units, size, budget)
            payload.append([([pack(row, self.columns, drawn) for row in mine], counts) for mine in rows])
        return await self.cluster.share(payload)

    async def train(self, step: int, payload: Any) -> dict[str, float]:
        """One step on every rank. Metrics are the ranks' shares added up; times are the slowest rank's."""
        async with self.asking:
            if self.turns:
                await everyone(self.engines, "sleep")
            teams, given, self.asked = [self.ranks, *self.apart], await self._given(payload), step
        answers = await asyncio.gather(*(everyone(team, "train", step, payload, given) for team in teams))
        return total(self.layouts, answers)

    async def score(self, payload: Any) -> dict[str, float]:
        """The metrics of one update that nothing learns from."""
        return total(self.layouts, [await everyone(self.ranks, "evaluate", payload, await self._given(payload))])

    async def _given(self, payload: Any) -> Any:
        """What each team's roles say of every micro-batch, for all of them; None where there is one team."""
        if not self.apart:
            return None
        answers = await asyncio.gather(*(everyone(team, "columns", payload) for team in [self.ranks, *self.apart]))
        return await self.cluster.share(exchange(self.layouts, answers))

    async def push(self, verify: bool, sent: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Move the policy's weights to every engine; none serves until all of them have all of it. Ranks do so after
        the training they were asked for before, and can be asked for more when ``sent`` is called. An engine that
        fails is replaced, and gets them with the others in another attempt."""
        async with self.pushing:  # a healed engine's and a step's would end each other's update
            for _ in range(TRIES):
                try:
                    return await self._push(verify, sent)
                except (WorkerDied, EngineError, TransportError):
                    await self._replace()
            return await self._push(verify, sent)

    async def _push(self, verify: bool, sent: Callable[[], None]) -> dict[str, float]:
        await everyone(self.engines, "ready")  # those that are well go on until one that starts is
        async with self.asking:
            servers = await everyone(self.engines, "begin_update", self.asked)
        try:
            answers = await everyone(self.ranks, "push", verify, servers)
            sent()
            return moved(answers, await everyone(self.engines, "end_update"))
        except BaseException:
            await asyncio.gather(*(e.call("abort_update", timeout=5) for e in self.engines), return_exceptions=True)
            raise

    async def replace_rollout(self, i: int) -> None:
        """Another rollout worker in the place of one that is gone."""
        async with self.healing:  # or it would know engines that are being replaced
            args = (self.manifest, self.engines, self.spec.client)
            self.rollouts[i] = await self.cluster.start(Process(f"rollout-{i}", ROLLOUT, args, cpus=0.5))

    async def heal(self) -> None:
        """Replace engines that are gone, and give whole weights to those that lack them."""
        replaced = await self._replace()
        states = await asyncio.gather(*(e.call("health") for e in self.engines), return_exceptions=True)
        if replaced or any(isinstance(state, BaseException) or state.get("stale") for state in states):
            await self.push(verify=False)

    async def _replace(self) -> bool:
        """Whether there were engines to replace; ``replaced`` names them."""
        async with self.healing:
            states = await asyncio.gather(*(e.call("health") for e in self.engines), return_exceptions=True)
            if dead := [i for i, state in enumerate(states) if isinstance(state, WorkerDied)]:
                for i in dead:
                    self.replaced.append((self.engines[i].name, str(states[i])))
                    self.engines[i] = await self.cluster.start(self.spec.processes[i])
                with suppress(WorkerDied):  # the push finds it dead
                    await everyone(self.engines, "ready")
                await everyone(self.ranks, "connect", self.engines)
                await asyncio.gather(*(w.call("connect", self.engines) for w in self.rollouts), return_exceptions=True)
            return bool(dead)


async def start(manifest: Manifest, hooks: Registry, cluster: Cluster) -> Fleet:
    """Start every process of the run side by side, and connect them."""
    columns, place = hooks.columns(), hooks.run.placement
    roles: dict[str, Role] = {"policy": Role(trained=True)} | hooks.roles()
    engines = hooks.engines() if place.engines else Engines([], "miles_core.edges.protocols:NoEngine")
    world, hands = place.trainers, place.rollout_workers
    gpus, turns = float(place.layout != "cpu"), place.layout == "colocate"
    teams = {"trainer": {name: role for name, role in roles.items() if name not in place.apart}}
    teams |= {name: {name: roles[name]} for name in place.apart}
    ranks = world * len(teams)
    hooks.progress(text=f"starting {ranks} training ranks, {len(engines.processes)} engines, {hands} rollout workers")

    async def trainers(team: str) -> tuple[list[Worker], list[Layout]]:
        args = [(manifest, i, world, teams[team], columns) for i in range(world)]
        processes = [Process(f"{team}-{i}", RANK, args[i], gpus=gpus) for i in range(world)]
        workers = list(await asyncio.gather(*map(cluster.start, processes)))
        return workers, await everyone(workers, "build", await workers[0].call("address"))

    async def samplers() -> tuple[list[Worker], list[Worker]]:
        servers = list(await asyncio.gather(*map(cluster.start, engines.processes)))
        args = (manifest, servers, engines.client)
        workers = [Process(f"rollout-{i}", ROLLOUT, args, cpus=0.5) for i in range(hands)]
        return servers, list(await asyncio.gather(*map(cluster.start, workers)))

    building = asyncio.gather(*map(trainers, teams))
    await asyncio.wait([building], timeout=None if turns else 0)  # in turns engines take what trainers leave
    ((trained, layouts), *others), (served, rolling) = await asyncio.gather(building, samplers())
    told = await everyone(trained, "connect", served) + await everyone(served, "ready")
    for text in dict.fromkeys(filter(None, told)):
        hooks.progress(text=text)
    return Fleet(cluster, trained, layouts, served, rolling, [t for t, _ in others], columns, turns, manifest, engines)
