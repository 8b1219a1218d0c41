"""The driver: turns the loop, holds no tensor, uses no GPU.

    prompts ─▶ rollouts ─▶ ready ─▶ steps ─▶ weights ─┐
                  ▲                                   │
                  └───────────── Weights ◀────────────┘

With ``max_staleness`` 0 the two take turns, with 1 they overlap by one step; nothing else differs. Weights move, and
checkpoints are written, only while ``rollouts`` rests: a run that is resumed goes on with the very same groups.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..edges.protocols import RunState, Store, WorkerDied, both, everyone
from ..plugins import Manifest, Registry
from ..types import Group, Refused, Sample
from .fleet import Fleet, start

Ready = tuple[list[Group], dict[str, float], Any]  # a step's groups, their metrics, and what the ranks train on
PATIENCE = 50  # waves of prompts without one group to train on, before the run is called hopeless


async def train(manifest: Manifest, run_dir: Path, resume: bool) -> None:
    """Run to the last step. Raises what ended the run; every process started here is gone by then."""
    current = asyncio.current_task()
    assert current is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)  # ends like Ctrl-C
    hooks = manifest.registry("driver")
    store: Store = hooks.store(run_dir=run_dir)
    if aside := store.claim(resume):
        hooks.progress(text=f"the run found in {run_dir} is now in {aside}")
    (run_dir / "config.json").write_text(json.dumps(manifest.tables, indent=1))
    (run_dir / "manifest.json").write_text(json.dumps({"miles-core": manifest.core} | manifest.versions, indent=1))
    found = store.newest(lambda text: hooks.progress(text=text)) if resume else None
    error, cluster = None, hooks.cluster(run_dir=run_dir)
    try:
        loop = Loop(hooks.run, hooks, await start(manifest, hooks, cluster), store, run_dir)
        await loop.restore(found)
        await loop.turn()
    except BaseException as caught:
        if isinstance(error := caught, WorkerDied):
            hooks.failure(process="", error=str(caught), action="the run stops; miles run --resume goes on from here")
        raise
    finally:
        try:
            hooks.run_end(error=error)
        finally:
            await cluster.close()


class Weights:
    """The version in the engines, who waits for the next one, and who waits for them to wait."""

    def __init__(self, version: int) -> None:
        self.version = version
        self._moved = asyncio.Event()
        self.resting = asyncio.Event()  # whoever samples waits for weights that are not there yet, or is done
        self._wanted: float = version  # what ``reach`` waits for

    async def reach(self, version: int) -> None:
        """Wait for the weights to be at ``version`` or beyond."""
        self._wanted = version
        while self.version < version:
            self._moved.clear()
            self.resting.set()
            await self._moved.wait()
        self.resting.clear()

    def rest(self) -> None:
        """Nothing is left to sample."""
        self._wanted = math.inf
        self.resting.set()

    def move(self, version: int) -> None:
        self.version = version
        if version >= self._wanted:  # who waited goes on, and does not rest from this moment
            self.resting.clear()
        self._moved.set()


class Loop:
    def __init__(self, run: RunConfig, hooks: Registry, fleet: Fleet, store: Store, run_dir: Path) -> None:
        self.run, self.hooks, self.fleet, self.store, self.run_dir = run, hooks, fleet, store, run_dir
        self.state, self.weights = RunState(), Weights(0)
        self.ready: asyncio.Queue[Ready] = asyncio.Queue()
        self.ahead: tuple[float, asyncio.Task[tuple[dict[str, float], float]]] | None = None  # the next step's training
        self.prompts: Iterator[Sample] = iter(())

    async def restore(self, found: tuple[Path, RunState] | None) -> None:
        """Put every process where the checkpoint left it, and the engines at the trainer's weights."""
        if found:
            folder, self.state = found
            await everyone(self.fleet.trainers, "load", str(folder))
            self.hooks.restore(state=self.state.plugins)
            self.hooks.progress(text=f"going on after step {self.state.step}, from {folder}")
        for groups, metrics in self.state.waiting:
            await self.hand(groups, metrics)
        self.prompts = self.hooks.prompts(split="train", start=self.state.cursor)
        self.weights = Weights(self.state.step)
        await self.fleet.push(self.state.step, verify=True)  # also proves, before any step, that weights arrive
        self.began = time.perf_counter() - self.state.seconds

    async def turn(self) -> None:
        """Both coroutines, until the last step is done."""
        self.hooks.run_start(run_dir=self.run_dir, step=self.state.step)
        if self.run.eval.every and not self.state.step:
            self.hooks.step_end(step=0, metrics=await self.evaluate(0) | {"time_s": 0.0})
        await both(asyncio.ensure_future(self.rollouts()), asyncio.ensure_future(self.steps()))

    # -- rollouts ------------------------------------------------------------------------------------------------
    async def rollouts(self) -> None:
        """Consumes prompts, produces groups, step after step. Waits for weights new enough. Unblocked by ``steps``."""
        for step in range(self.state.step + 1 + self.ready.qsize(), self.run.steps + 1):
            await self.weights.reach(step - 1 - self.run.max_staleness)
            await self.hand(*await self.gather(step))
        self.weights.rest()

    async def hand(self, groups: list[Group], metrics: dict[str, float]) -> None:
        """Queue a step's groups, packed and within reach of the ranks, so that a free trainer waits for nothing."""
        packed = await self.fleet.share(self.updates(groups, self.run.batch.updates), self.run.batch.micro_tokens)
        self.ready.put_nowait((groups, metrics, packed))

    async def gather(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of one step: those dropped are replaced by other prompts until there are enough."""
        kept: list[Group] = []
        dropped: Counter[str] = Counter()
        times: dict[str, float] = {}
        seen: list[Group] = []
        for wave in count(1):
            fresh = [self.next_group() for _ in range(self.run.batch.groups - len(kept))]
            groups, seconds = await self.fleet.roll(fresh)
            times = {name: times.get(name, 0.0) + spent for name, spent in seconds.items()}
            seen += groups
            for group in groups:
                reason = self.hooks.drop_group(group=group)
                self.hooks.group_end(group=group, dropped=reason)
                if reason is None:
                    kept.append(group)
                else:
                    dropped[reason] += 1
            if len(kept) == self.run.batch.groups:
                metrics: dict[str, float] = self.hooks.metrics(step=step, groups=seen, evaluating=False)
                self.score(kept)
                return kept, metrics | times | {"rollout/dropped_groups": float(dropped.total())}
            if wave == PATIENCE and not kept:
                why = ", ".join(f"{n} because {reason}" for reason, n in dropped.items())
                raise Refused(f"no group was worth training on in {dropped.total()} prompts: {why}")
        raise AssertionError

    def score(self, groups: list[Group]) -> None:
        for group, scores in zip(groups, self.hooks.score(groups=groups), strict=True):
            for sample, score in zip(group.samples, scores, strict=True):
                sample.score = score

    def next_group(self) -> Group:
        sample = next(self.prompts, None)
        if sample is None:
            raise Refused(f"the training prompts ended after {self.state.cursor}; the run needs more for its steps")
        self.state.cursor += 1
        return Group(self.state.cursor, [sample])

    # -- steps ---------------------------------------------------------------------------------------------------
    async def steps(self) -> None:
        """Consumes groups, produces weights. Waits for groups, then for rest. Unblocked by ``rollouts``."""
        told = time.perf_counter()
        for step in range(self.state.step + 1, self.run.steps + 1):
            free, training = self.ahead or (told, asyncio.ensure_future(self.train(step, await self.ready.get())))
            fed, self.ahead = time.perf_counter(), None
            saves = self.due(self.run.checkpoint.every, step) or step == self.run.steps
            moving = asyncio.ensure_future(self.move(step, goes_on=not saves))
            (metrics, trained), (moved, rested, served) = await both(training, moving)
            waited = max(fed - max(told, free), 0.0) + max(rested - trained, 0.0)
            metrics |= moved | {"time/sync": max(served - max(rested, trained), 0.0), "weight_version": float(step)}
            if self.due(self.run.eval.every, step):
                metrics |= await self.evaluate(step)
            self.state.step, self.state.seconds = step, time.perf_counter() - self.began
            folder = await self.save(metrics) if saves else None
            began, told = told, time.perf_counter()  # a step lasts from one line of metrics to the next
            metrics |= self.times(metrics, waited, told - began, began - free)
            self.hooks.step_end(step=step, metrics=metrics)
            if folder:  # a checkpoint counts only after its step was told of: a resumed run will not do it again
                self.hooks.saved(step=step, folder=self.store.commit(folder, self.state))
            self.weights.move(step)
        await everyone(self.fleet.ranks, "save_hf", str(self.run_dir / "model"))
        self.hooks.progress(text=f"the trained model is in {self.run_dir / 'model'}")

    async def train(self, step: int, ready: Ready) -> tuple[dict[str, float], float]:
        """Train on a step's groups; its metrics so far, and when that was done."""
        return ready[1] | await self.fleet.train(step, ready[2]), time.perf_counter()

    async def move(self, step: int, goes_on: bool) -> tuple[dict[str, float], float, float]:
        """Have the step's weights sent, behind its training, to engines at rest, and then the next step trained."""

        def sent() -> None:
            if goes_on and not self.ready.empty():
                self.ahead = time.perf_counter(), asyncio.ensure_future(self.train(step + 1, self.ready.get_nowait()))

        await self.weights.resting.wait()
        rested = time.perf_counter()
        return await self.fleet.push(step, verify=False, sent=sent), rested, time.perf_counter()

    def updates(self, groups: list[Group], n: int) -> list[list[list[Sample]]]:
        """The groups' samples as units, dealt into ``n`` optimizer updates by whole groups."""
        dealt: list[list[list[Sample]]] = []
        for i in range(n):
            units = [unit for group in groups[i::n] for unit in self.hooks.units(group=group)]
            kept = [[sample for sample in unit if sample.score is not None] for unit in units]
            dealt.append([unit for unit in kept if unit])
        return dealt

    def due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.run.steps)

    async def evaluate(self, step: int) -> dict[str, float]:
        """Sample the held-out split once with the weights the engines have; without engines ask the trainer of it."""
        began = time.perf_counter()
        prompts = islice(self.hooks.prompts(split="eval", start=0), self.run.eval.prompts)
        groups = [Group(i, [sample]) for i, sample in enumerate(prompts)]
        if not groups:
            raise Refused("eval.every is set, but there are no held-out prompts")
        groups, _ = await self.fleet.roll(groups, evaluating=True)
        metrics: dict[str, float]
        if self.run.placement.engines:
            metrics = self.hooks.metrics(step=step, groups=groups, evaluating=True)
            self.hooks.evaluated(step=step, groups=groups, metrics=metrics)
        else:
            self.score(groups)
            packed = await self.fleet.share(self.updates(groups, 1), self.run.batch.micro_tokens)
            metrics = {f"eval/{name}": value for name, value in (await self.fleet.evaluate(packed)).items()}
        return metrics | {"time/eval": time.perf_counter() - began}

    async def save(self, metrics: dict[str, float]) -> Path:
        """Write a checkpoint that does not count yet."""
        began = time.perf_counter()
        folder = self.store.begin(self.state.step)
        await everyone(self.fleet.trainers, "save", str(folder))
        items = [self.ready.get_nowait() for _ in range(self.ready.qsize())]
        for item in items:
            self.ready.put_nowait(item)
        self.state.waiting = [(groups, metrics) for groups, metrics, _ in items]
        self.state.plugins = self.hooks.state()
        metrics["time/checkpoint"] = time.perf_counter() - began
        return folder

    def times(self, metrics: dict[str, float], waited: float, wall: float, ahead: float) -> dict[str, float]:
        """Where the time went. ``time/ahead`` of the training was before the step's own time; ``time/other``, the
        driver's own, is none of the phases."""
        phases = sum(metrics.get(f"time/{phase}", 0.0) for phase in ("train", "sync", "eval", "checkpoint"))
        other = wall + ahead - waited - phases
        if not self.run.max_staleness:  # the wait was for sampling and rewarding, and for nothing else
            other += waited - metrics.get("time/sample", 0.0) - metrics.get("time/reward", 0.0)
        spent = {"time/step": wall, "time/wait": waited, "time/ahead": ahead, "time/other": other}
        rate = metrics.get("rollout/tokens", 0.0) / wall
        return spent | {"time_s": time.perf_counter() - self.began, "tokens_per_s": rate}
