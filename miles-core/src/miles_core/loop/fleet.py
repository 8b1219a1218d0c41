"""The processes of a run, started together and asked together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..edges.protocols import Cluster, Process, Worker, everyone
from ..plugins import Manifest, Registry
from ..types import Column, Group, Layout
from .batch import Unit, count, distribute, pack

ROLLOUT, RANK = "miles_core.loop.rollout:RolloutWorker", "miles_core.loop.rank:TrainingRank"


@dataclass(slots=True)
class Fleet:
    cluster: Cluster
    ranks: list[Worker]
    layouts: list[Layout]
    engines: list[Worker]
    rollouts: list[Worker]
    columns: dict[str, Column]
    turns: bool  # engines give their memory to the trainers for the length of a step's training

    async def roll(self, groups: list[Group], evaluating: bool = False) -> tuple[list[Group], dict[str, float]]:
        """Sample and reward ``groups``, split evenly over the rollout workers; seconds of the slowest."""
        share = -(-len(groups) // len(self.rollouts))
        parts = [groups[i : i + share] for i in range(0, len(groups), share)]
        calls = [w.call("roll", part, evaluating) for w, part in zip(self.rollouts, parts, strict=False)]
        answers = await asyncio.gather(*calls)
        seconds = {f"time/{kind}": max(took[kind] for _, took in answers) for kind in ("sample", "reward")}
        return [group for part, _ in answers for group in part], seconds

    async def share(self, updates: list[list[Unit]], budget: int) -> Any:
        """A step's updates, packed for the data-parallel ranks, where every rank can read them."""
        size = self.layouts[0].dp_size
        payload = []
        for units in updates:
            counts = count(units)
            rows = distribute(units, size, budget)
            payload.append([([pack(row, self.columns) for row in mine], counts) for mine in rows])
        return await self.cluster.share(payload)

    async def train(self, step: int, payload: Any) -> dict[str, float]:
        """One step on every rank. Metrics are the ranks' shares added up; times are the slowest rank's."""
        if self.turns:
            await everyone(self.engines, "begin_update")
        answers = await everyone(self.ranks, "train", step, payload)
        reports = [answer for answer, layout in zip(answers, self.layouts, strict=True) if layout.reports]
        metrics: dict[str, float] = {}
        for name in reports[0]:
            values = [report[name] for report in reports]
            shared = name.startswith("time/") or name.endswith(("grad_norm", "lr"))
            metrics[name] = max(values) if shared else sum(values)
        return metrics

    async def push(self, version: int, verify: bool, sent: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Move the policy's weights to every engine; none serves until all of them have all of it. Ranks do so after
        the training they were asked for before, and can be asked for more when ``sent`` is called."""
        await everyone(self.engines, "begin_update")
        try:
            answers = await everyone(self.ranks, "push", verify)
            sent()
            await everyone(self.engines, "end_update", version)
        except BaseException:
            await asyncio.gather(*(e.call("abort_update", timeout=5) for e in self.engines), return_exceptions=True)
            raise
        return {"sync/bytes": sum(answer.get("bytes", 0.0) for answer in answers)}


async def start(manifest: Manifest, hooks: Registry, cluster: Cluster) -> Fleet:
    """Start every process of the run side by side, and connect them."""
    run, roles, columns, engines = hooks.run, hooks.roles(), hooks.columns(), hooks.engines()
    world, hands = run.placement.trainers, run.placement.rollout_workers
    gpus, turns = float(run.placement.layout != "cpu"), run.placement.layout == "colocate"
    ranks = [Process(f"trainer-{i}", RANK, (manifest, i, world, roles, columns), gpus=gpus) for i in range(world)]
    hooks.progress(text=f"starting {world} training ranks, {len(engines.processes)} engines, {hands} rollout workers")

    async def trainers() -> tuple[list[Worker], list[Layout]]:
        workers = list(await asyncio.gather(*map(cluster.start, ranks)))
        return workers, await everyone(workers, "build", await workers[0].call("address"))

    async def samplers() -> tuple[list[Worker], list[Worker]]:
        servers = list(await asyncio.gather(*map(cluster.start, engines.processes)))
        args = (manifest, servers, engines.client)
        workers = [Process(f"rollout-{i}", ROLLOUT, args, cpus=0.5) for i in range(hands)]
        return servers, list(await asyncio.gather(*map(cluster.start, workers)))

    building = asyncio.ensure_future(trainers())
    await asyncio.wait([building], timeout=None if turns else 0)  # in turns engines take what trainers leave
    (trained, layouts), (served, rolling) = await asyncio.gather(building, samplers())
    told = await everyone(trained, "connect", served) + await everyone(served, "ready")
    for text in dict.fromkeys(filter(None, told)):
        hooks.progress(text=text)
    return Fleet(cluster, trained, layouts, served, rolling, columns, turns)
