"""What a process was doing when, from the calls it was asked."""

import asyncio
import pickle
import time

from miles_core.edges.protocols import Process
from miles_core.pacing import WatchedCluster
from miles_core.testing.threads import Threads

STEP = 0.05  # seconds


class Slow:
    """Takes its time over everything, one thing after another."""

    def __init__(self):
        self.turn = asyncio.Lock()

    async def train(self):
        async with self.turn:
            await asyncio.sleep(STEP)
        return "trained"

    async def sleep(self):
        await self.train()
        self.stays = not getattr(self, "stays", True)
        return not self.stays

    push = begin_update = end_update = abort_update = saved = train


def watched(work):
    """What was told while ``work`` was done to a process: what it did, and from when to when in units of ``STEP``."""
    told = []

    async def go():
        cluster = WatchedCluster(Threads(), lambda **span: told.append(span))
        try:
            worker = await cluster.start(Process("trainer-0", f"{__name__}:Slow"))
            await work(worker)
        finally:
            await cluster.close()

    began = time.time()
    asyncio.run(go())
    assert all(span["process"] == "trainer-0" and span["began"] >= began for span in told)
    return [(span["doing"], (span["ended"] - span["began"]) / STEP) for span in told], told


def test_what_is_asked_at_once_is_done_one_after_another():
    async def work(worker):
        assert await asyncio.gather(worker.call("train"), worker.call("push"), worker.call("saved")) == ["trained"] * 3
        await asyncio.sleep(3 * STEP)
        await worker.call("train")

    spent, spans = watched(work)
    assert [doing for doing, _ in spent] == ["train", "sync", "wait", "train"]
    assert sum(length for _, length in spent[:2]) > 1.8 and all(length > 0.5 for _, length in spent)
    assert all(before["ended"] <= after["began"] for before, after in zip(spans, spans[1:], strict=False))


def test_an_engine_serves_syncs_and_sleeps():
    async def work(worker):
        for method in ("begin_update", "end_update", "sleep", "end_update", "sleep", "begin_update", "end_update"):
            await worker.call(method)
            await asyncio.sleep(STEP)

    spent, _ = watched(work)
    updates = ["sync", "sync", "sync"]
    assert [doing for doing, _ in spent] == [*updates, "serve", "sync", "sleep", "sync", "serve", *updates]
    assert spent[7][1] > 2.5  # it serves on behind a call to sleep that it need not obey


def test_a_copy_for_another_process_is_the_worker_itself():
    async def work(worker):
        copy = pickle.loads(pickle.dumps(worker))
        assert copy.name == "trainer-0" and await copy.call("train") == "trained"

    assert watched(work)[0] == []
