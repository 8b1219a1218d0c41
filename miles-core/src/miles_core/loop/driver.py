"""The driver: turns the loop, holds no tensor, uses no GPU.

    prompts ─▶ rollouts ─▶ queue ─▶ steps ─▶ weights ─┐
                  ▲                                   │
                  └──────────── Admission ◀───────────┘

With ``max_staleness`` 0 the two take turns, with 1 they overlap by one step; there, weights move and checkpoints are
written only while rollouts rest, and a run that is resumed goes on with the very same groups. Streaming, neither waits
for the other longer than staleness demands; nothing else differs.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

from ..edges.lasting import RunState, Store, insist
from ..edges.protocols import WorkerDied, both, everyone
from ..pacing import WatchedCluster, times
from ..packing import deal
from ..plugins import Manifest, Registry
from ..samples import credit
from ..types import Group, Refused
from .fleet import Fleet, start
from .rollouts import Rollouts

Ready = tuple[list[Group], dict[str, float], Any]  # a step's groups, their metrics, and what the ranks train on
Trained = tuple[dict[str, float], list[Group], float]  # metrics of a step, its groups, and when that was done
Moved = tuple[dict[str, float], float, float]  # metrics, when engines could stand still, and when they served again


async def train(manifest: Manifest, run_dir: Path, resume: bool) -> None:
    """Run to the last step. Raises what ended the run; every process started here is gone by then."""
    if current := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)  # ends like Ctrl-C
    hooks = manifest.registry("driver")
    store: Store = hooks.store(run_dir=run_dir)
    if aside := store.claim(resume):
        hooks.progress(text=f"the run found in {run_dir} is now in {aside}")
    (run_dir / "config.json").write_text(json.dumps(manifest.tables, indent=1))
    (run_dir / "manifest.json").write_text(json.dumps({"miles-core": manifest.core} | manifest.versions, indent=1))
    error, saved = None, 0
    try:
        while (newer := await attempt(manifest, hooks, store, run_dir, resume, saved)) is not None:
            resume, saved = True, newer
    except BaseException as caught:
        if isinstance(error := caught, WorkerDied):
            hooks.failure(process="", error=str(caught), action="the run stops; miles run --resume goes on from here")
        raise
    finally:
        hooks.run_end(error=error)


async def attempt(
    manifest: Manifest, hooks: Registry, store: Store, run_dir: Path, resume: bool, saved: int
) -> int | None:
    """Start every process, and go on to the last step. Where one dies whose work no other can take over, and there is
    a checkpoint newer than ``saved``, all of them end: returns the step of that checkpoint.
    """

    def say(text: str) -> None:
        hooks.progress(text=text)

    cluster, loop = WatchedCluster(hooks.cluster(run_dir=run_dir), hooks.span), None
    found = store.newest(say) if resume else None
    try:
        fleet, queue = await start(manifest, hooks, cluster), hooks.queue(run_dir=run_dir, cluster=cluster, say=say)
        loop = Loop(hooks, fleet, store, Rollouts(hooks, fleet, store.ledger(say), queue), run_dir)
        await loop.restore(found)
        await loop.turn()
        return None
    except WorkerDied as died:
        if loop is None or loop.rollouts.saved <= saved:
            raise
        action = f"every process starts anew, and goes on after step {loop.rollouts.saved}"
        hooks.failure(process="", error=str(died), action=action)
        return loop.rollouts.saved
    finally:
        if loop:
            await loop.close()
        await cluster.close()


class Loop:
    def __init__(self, hooks: Registry, fleet: Fleet, store: Store, rollouts: Rollouts, run_dir: Path) -> None:
        self.run, self.hooks, self.fleet, self.store, self.rollouts = hooks.run, hooks, fleet, store, rollouts
        self.run_dir, self.state = run_dir, RunState()
        self.ahead: tuple[float, asyncio.Task[Trained]] | None = None  # the next step's training
        self.next: asyncio.Task[Ready] | None = None  # the next step's groups, within reach of the ranks
        self.written: Any = None  # the task of writing the files of the newest checkpoint
        self.saving: asyncio.Task[None] | None = None  # until it counts

    async def restore(self, found: tuple[Path, RunState] | None) -> None:
        """Put every process where the checkpoint left it, and the engines at the trainer's weights."""
        if found:
            folder, self.state = found
            await everyone(self.fleet.trainers, "load", str(folder))
            self.hooks.restore(state=self.state.plugins)
            self.hooks.progress(text=f"going on after step {self.state.step}, from {folder}")
        await self.rollouts.restore(self.state)
        self.fleet.asked = self.state.step
        await self.fleet.push(verify=True)  # also sees, before any step, whether weights arrive
        self.began = time.perf_counter() - self.state.seconds

    async def turn(self) -> None:
        """Rollouts and steps, until the last step is done."""
        self.hooks.run_start(run_dir=self.run_dir, step=self.state.step)
        if self.run.eval.every and not self.state.step:
            self.hooks.step_end(step=0, metrics=await self.evaluate(0) | {"time_s": 0.0})
        await both(asyncio.ensure_future(self.rollouts.turn()), asyncio.ensure_future(self.steps()))

    async def steps(self) -> None:
        """Consumes groups, produces weights. Waits for groups, then for rest. Unblocked by ``rollouts``."""
        told, self.next = time.perf_counter(), asyncio.ensure_future(self.gather(self.state.step + 1))
        for step in range(self.state.step + 1, self.run.steps + 1):
            assert self.next
            free, training = self.ahead or (told, asyncio.ensure_future(self.train(step, await self.next)))
            fed, self.ahead = time.perf_counter(), None
            if self.saving and self.saving.done():
                await self.saved()  # raises what went wrong with it, now and not at the next one
            self.next = None if step == self.run.steps else asyncio.ensure_future(self.gather(step + 1))
            saves = self.run.saves(step)
            moving = asyncio.ensure_future(self.move(step, training, goes_on=not saves))
            (metrics, groups, trained), (moved, rested, served) = await both(training, moving)
            waited = max(fed - max(told, free), 0.0) + max(rested - trained, 0.0)
            metrics |= moved | {"time/sync": max(served - max(rested, trained), 0.0), "weight_version": float(step)}
            if self.run.due(self.run.eval.every, step):
                metrics |= await self.evaluate(step)
            self.state.step, self.state.seconds = step, time.perf_counter() - self.began
            await self.rollouts.trained(step, groups)
            folder = await self.save(metrics) if saves else None
            began, told = told, time.perf_counter()  # a step lasts from one line of metrics to the next
            metrics |= times(metrics, waited, told - began, began - free, turns=not self.run.max_staleness)
            metrics["time_s"] = time.perf_counter() - self.began
            self.hooks.step_end(step=step, metrics=metrics)
            if folder:  # a checkpoint counts only after its step was told of: a resumed run will not do it again
                self.saving = asyncio.ensure_future(self.commit(folder, pickle.loads(pickle.dumps(self.state))))
            await self.rollouts.move(step)
        await insist(self.hooks.progress, everyone, self.fleet.trainers, "save_hf", str(self.run_dir / "model"))
        await self.saved()
        self.hooks.progress(text=f"the trained model is in {self.run_dir / 'model'}")

    async def gather(self, step: int) -> Ready:
        """A step's groups, scored, packed and within reach of the ranks, so that a free trainer waits for nothing."""
        groups, metrics = await self.rollouts.take(step)
        self.score(groups)
        packed = await self.fleet.share(
            deal(groups, self.run.batch.updates, self.hooks.units), self.run.batch.micro_tokens
        )
        return groups, metrics, packed

    async def train(self, step: int, ready: Ready) -> Trained:
        """Train on a step's groups; its metrics so far, the groups, and when that was done."""
        groups, metrics, packed = ready
        return metrics | await self.fleet.train(step, packed), groups, time.perf_counter()

    async def move(self, step: int, training: asyncio.Task[Trained], goes_on: bool) -> Moved:
        """Have the step's weights sent, behind its training, and then the next step trained."""

        def sent() -> None:
            if goes_on and not self.ahead and self.next and self.next.done() and not self.next.exception():
                now, ready = time.perf_counter(), self.next.result()
                self.ahead = now, asyncio.ensure_future(self.train(step + 1, ready))

        if self.run.mode == "async" and self.run.rollout.weights != "drain":
            await asyncio.wait([training])  # engines stand still from when weights move, and there are none before
        else:
            await self.rollouts.rest()
        rested = time.perf_counter()
        return await self.fleet.push(verify=False, sent=sent), rested, time.perf_counter()

    def score(self, groups: list[Group]) -> None:
        credit(groups, self.hooks.score(groups=groups), self.hooks.owner["miles_score"])

    async def evaluate(self, step: int) -> dict[str, float]:
        """Sample the held-out split once with the weights the engines have; without engines ask the trainer of it."""
        began = time.perf_counter()
        prompts = islice(self.hooks.prompts(split="eval", start=0), self.run.eval.prompts)
        groups = [Group(i, [sample]) for i, sample in enumerate(prompts)]
        if not groups:
            raise Refused("eval.every is set, but there are no held-out prompts")
        groups = await self.rollouts.evaluate(groups)
        if self.run.placement.engines:
            metrics: dict[str, float] = self.hooks.metrics(step=step, groups=groups, evaluating=True)
            self.hooks.evaluated(step=step, groups=groups, metrics=metrics)
        else:
            self.score(groups)
            packed = await self.fleet.share(deal(groups, 1, self.hooks.units), self.run.batch.micro_tokens)
            metrics = {f"eval/{name}": value for name, value in (await self.fleet.score(packed)).items()}
        return metrics | {"time/eval": time.perf_counter() - began}

    async def save(self, metrics: dict[str, float]) -> Path:
        """Have a checkpoint written, not to count before ``commit``; ranks copy what is in it before they train on."""
        began = time.perf_counter()
        await self.saved()
        folder = await insist(self.hooks.progress, asyncio.to_thread, self.store.begin, self.state.step)
        await insist(self.hooks.progress, everyone, self.fleet.trainers, "save", str(folder))
        self.written = asyncio.ensure_future(insist(self.hooks.progress, everyone, self.fleet.trainers, "saved"))
        self.rollouts.save(self.state)
        self.state.plugins = self.hooks.state()
        metrics["time/checkpoint"] = time.perf_counter() - began
        return folder

    async def commit(self, folder: Path, state: RunState) -> None:
        """Once it is written, and all that it stands on is durable, a checkpoint counts."""
        await self.written
        await self.rollouts.sync()
        folder = await insist(self.hooks.progress, asyncio.to_thread, self.store.commit, folder, state)
        self.hooks.saved(step=state.step, folder=folder)
        await self.rollouts.acknowledge(state.step)

    async def close(self) -> None:
        for task in (self.next, self.written, self.saving, self.ahead and self.ahead[1]):
            if task:
                task.cancel()
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks any more
        await self.rollouts.close()

    async def saved(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        if self.saving:
            await self.saving
            self.saving = None
