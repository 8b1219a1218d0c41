"""Prompts out to the rollout workers, scored groups into the queue, as many at once as staleness allows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

from ..edges.lasting import Ledger, Queue, RunState
from ..edges.protocols import EngineError, WorkerDied
from ..pacing import Admission
from ..plugins import Registry
from ..samples import newest, staleness, versions
from ..types import Group, Refused, Sample
from .fleet import Fleet
from .rollout import Rolled

PATIENCE = 50  # steps' worth of prompts without one group to train on, before the run is called hopeless
TRIES = 5  # failures of engines in a row, before they are the run's


class Rollouts:
    """Every prompt from the ledger to the queue. ``take`` is how the trainer gets a step's groups."""

    def __init__(self, hooks: Registry, fleet: Fleet, ledger: Ledger, queue: Queue) -> None:
        self.run, self.hooks, self.fleet, self.ledger, self.queue = run, *_ = hooks.run, hooks, fleet, ledger, queue
        streaming = run.mode == "async"
        self.admission = Admission(run.batch.groups, run.steps, run.max_staleness, streaming)
        self.saved = 0  # the step of the newest checkpoint
        self._dropped: list[Group] = []  # since a step's groups were taken
        self._waves: dict[int, tuple[float, float]] = {}  # since then: seconds until sampled, and until rewarded
        self._taken: tuple[list[int], list[Group]] = [], []  # the step's, until it is trained, and what was dropped
        self._spent: dict[int, int] = {}  # groups that may have to be trained on again: id, and the step they were of
        self._flying: dict[int, tuple[str, int]] = {}  # id: the worker that has it, and the wave it belongs to
        self._prompts: tuple[int, Iterator[Sample]] = -1, iter(())  # how many of the data the iterator is past
        self._wave = self._failures = self._fruitless = 0
        self._changed = asyncio.Condition()

    async def restore(self, state: RunState) -> None:
        """Put queue and ledger where the checkpoint left them. What survived and is not of later weights is kept."""
        found = await self.queue.open()
        groups = self.queue.each()
        kept = {group.id: min(versions(group, state.step)) async for group in groups if newest(group) <= state.step}
        if not self.admission.streaming:  # a step's groups are whole waves, or the resumed run would be another one
            kept = {id: kept[id] for id in kept.keys() & state.ripe}
        self.ledger.rewind(state.position, state.step, kept)
        self.admission.ripe = {id: age for id, age in kept.items() if self.ledger.where(id)[0] == "queue"}
        await self.queue.forget([id for id in found if id not in self.admission.ripe])
        self._dropped, self.saved, self.admission.version = state.dropped, state.step, state.step
        self.admission.used = state.step * self.run.batch.groups + len(self.admission.ripe)

    async def turn(self) -> None:
        """Consumes prompts, produces groups. Waits for room, which weights that move and groups that fail make."""
        parts = [self._lead(), self._watch(), *(self._collect(i) for i in range(len(self.fleet.rollouts)))]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _lead(self) -> None:
        """Fill what room there is, until the last weights are there."""
        while self.admission.version < self.run.steps:
            await self._until(lambda: self.admission.room > 0 or self.admission.version == self.run.steps)
            await self._send(self.admission.room)

    async def _send(self, n: int) -> None:
        """Lease ``n`` prompts to the workers, least load first, and have each begin its share at once."""
        self._wave += 1
        load = Counter({worker.name: 0 for worker in self.fleet.rollouts})
        load.update(name for name, _ in self._flying.values())
        shares: dict[str, list[Group]] = {worker.name: [] for worker in self.fleet.rollouts}
        for _ in range(n):
            name = min(load, key=load.__getitem__)
            id = self.ledger.next()
            shares[name].append(Group(id, [self._prompt(id)]))
            self.ledger.lease([id], name)
            load[name] += 1
            self._flying[id] = name, self._wave
        self.admission.fly(len(self._flying))
        asked = [worker.call("begin", shares[worker.name]) for worker in self.fleet.rollouts if shares[worker.name]]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, WorkerDied):  # ``_collect`` finds it dead
                raise answer

    def _prompt(self, id: int) -> Sample:
        at, prompts = self._prompts
        if id != at + 1:
            prompts = self.hooks.prompts(split="train", start=id - 1)
        sample = next(prompts, None)
        if sample is None:
            raise Refused(f"the training prompts ended after {id - 1}; the run needs more for its steps")
        self._prompts = id, prompts
        return sample

    async def _collect(self, i: int) -> None:
        """Consumes what one worker is done with, and replaces a worker that died."""
        while True:
            worker = self.fleet.rollouts[i]
            try:
                for rolled in await worker.call("collect"):
                    await self._came(worker.name, rolled)
            except WorkerDied as died:
                await self.fleet.replace_rollout(i)
                lost = [id for id, (name, _) in self._flying.items() if name == worker.name]  # until now, too
                action = f"it is replaced; its {len(lost)} groups are sampled again"
                self.hooks.failure(process=worker.name, error=str(died), action=action)
                await self._back(lost, f"{worker.name} died")

    async def _came(self, name: str, rolled: Rolled) -> None:
        id, wave = rolled.id, self._flying[rolled.id][1]
        if rolled.group is None:
            return await self._failed(id, rolled.error)
        self._failures = 0
        began = rolled.ended - rolled.done
        self.hooks.span(process=name, doing="sample", began=began, ended=began + rolled.sampled)
        self.hooks.span(process=name, doing="reward", began=began + rolled.sampled, ended=rolled.ended)
        group, (sampled, done) = rolled.group, self._waves.get(wave, (0.0, 0.0))
        self._waves[wave] = max(sampled, rolled.sampled), max(done, rolled.done)
        reason = self.hooks.drop_group(group=group)
        self.hooks.group_end(group=group, dropped=reason)
        self._fruitless = self._fruitless + 1 if reason else 0
        if reason is None:
            self.admission.full_s += await self.queue.put(id, group, self.admission.needs)
            self.ledger.queue([id])
            self.admission.land(id, min(versions(group, self.admission.version)))
        else:
            self.ledger.drop([id], reason)
            self._dropped.append(group)
        if self._fruitless >= PATIENCE * self.run.batch.groups:
            raise Refused(f"no group was worth training on in {self._fruitless} prompts; the last one: {reason}")
        del self._flying[id]
        await self._tell()

    async def _failed(self, id: int, error: str) -> None:
        """An engine failed a group: it is sampled again, by an engine that is well."""
        self._failures += 1
        if self._failures > TRIES * self.run.batch.groups:
            raise EngineError(error)
        await self._heal()
        await self._back([id], "an engine failed")

    async def _back(self, ids: list[int], why: str) -> None:
        self.ledger.back(ids, why)
        for id in ids:
            self._flying.pop(id, None)
        await self._tell()

    async def _tell(self) -> None:
        self.admission.fly(len(self._flying))
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _watch(self) -> None:
        """Have an engine that died replaced, and one that came back without weights given some."""
        while True:
            await asyncio.sleep(1)
            if self._flying:
                await self._heal()

    async def _heal(self) -> None:
        await self.fleet.heal()
        while self.fleet.replaced:
            name, error = self.fleet.replaced.pop(0)
            self.hooks.failure(process=name, error=error, action="it is replaced; what it was at is sampled again")

    async def evaluate(self, groups: list[Group]) -> list[Group]:
        """Held-out prompts, sampled and rewarded; again where an engine failed."""
        for _ in range(TRIES):
            try:
                return await self.fleet.evaluate(groups)
            except (EngineError, WorkerDied) as error:
                failed = error
                await self._heal()
        raise failed

    async def take(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Consumes a step's groups from the queue; those of the oldest weights first. Waits until there are enough."""
        while not (ids := self.admission.pick(step)):
            await self._until(lambda: self.admission.due(step))
            await self._sort_out(self.admission.weed(step))
        self.ledger.give(ids, step)
        dropped, waves = self._dropped, list(self._waves.values())
        self._taken, self._dropped, self._waves = (ids, dropped), [], {}
        groups: list[Group] = await self.queue.get(ids)
        sampled = sorted([*groups, *dropped], key=lambda group: group.id)
        metrics: dict[str, float] = self.hooks.metrics(step=step, groups=sampled, evaluating=False)
        metrics |= staleness(groups, step) | self.admission.sampling(waves)
        return groups, metrics | {"rollout/dropped_groups": float(len(dropped))}

    async def _sort_out(self, old: list[int]) -> None:
        """Have what became too old dropped, or sampled again."""
        if old:
            (self.ledger.drop if self.run.rollout.too_old == "drop" else self.ledger.back)(old, "too old")
            await self.queue.forget(old)
            await self._tell()

    async def rest(self) -> None:
        """Wait until nothing is under way, and nothing will be before weights move."""
        self.admission.draining = True
        await self._until(lambda: self.admission.rests)

    async def move(self, version: int) -> None:
        self.admission.version, self.admission.draining = version, False
        await self._tell()

    async def trained(self, step: int, groups: list[Group]) -> None:
        """A step is done. What no resume could use, since it saw weights that no checkpoint has, is forgotten."""
        self.ledger.trained(step)
        if self._taken[0] == [group.id for group in groups]:
            self._taken = [], []
        self._spent |= {group.id: step for group in groups}
        await self._forget([group.id for group in groups if newest(group) > self.saved])

    def save(self, state: RunState) -> None:
        """What a checkpoint must remember, of this moment."""
        taken, dropped = self._taken
        state.position, state.ripe = self.ledger.position, [*taken, *self.admission.ripe]
        state.dropped = [*dropped, *self._dropped]

    async def sync(self) -> None:
        await self.queue.sync()
        self.ledger.sync()

    async def acknowledge(self, step: int) -> None:
        """What was trained on up to ``step`` is in a checkpoint, and never needed again."""
        self.saved = step
        await self._forget([id for id, at in self._spent.items() if at <= step])

    async def _forget(self, ids: list[int]) -> None:
        for id in ids:
            del self._spent[id]
        await self.queue.forget(ids)

    async def close(self) -> None:
        await self.queue.close()
        self.ledger.close()
