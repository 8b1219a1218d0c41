"""The queue beside the bare object store, many groups through it, and many times its memory.

    python benchmarks/queueing.py --out benchmarks/results/queue

writes ``queue.json`` and ``queue.md``, row by row; rows that are not measured again stay. Everything is real: a local
Ray, the queue's process, its journal on the file system of ``--folder``. ``rate`` puts, gets and forgets values of
1 MB, as many under way as in a run; beside each round the same process puts as many of the same values into the object
store and gets them back, and writes as many bytes to a plain file. A round of the queue ends when nothing is left to
write to the journal. ``many`` is small groups, ``flow`` is values of 1 MB through a small memory, the consumer far
behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from miles_core.edges.cluster.cluster import RayCluster
from miles_core.edges.cluster.session import Session
from miles_core.edges.queue.queue import JournaledQueue
from miles_core.types import Group, Sample

BATCH, WAITING = 8, 16  # values of 1 MB that the consumer takes at once, and that wait before it does
SMALL_BATCH, SMALL_WAITING = 64, 1024  # of small ones
BARS = {"of the object store": 0.8, "grown, MB": 50.0, "last of first": 0.8}
MB = 1e6


def group(id: int, tokens: int, attempts: int = 16) -> Group:
    """What a rollout makes of a prompt: 15 bytes a token once pickled."""
    draw = random.Random(id)
    each = tokens // attempts
    samples = [
        Sample(id=f"{id}/{i}", tokens=[draw.randrange(256, 60_000) for _ in range(each)], mask=[True] * each,
               logprobs=[-draw.random() for _ in range(each)], versions=[3] * each, rewards={"exact": 1.0})
        for i in range(attempts)
    ]  # fmt: skip
    return Group(id, samples)


def kind(name: str) -> list[Any]:
    """Values of 1 MB, different ones: groups, which are pickled, and bytes, of which only copies are made."""
    if name == "groups":
        return [group(id, 66_600) for id in range(BATCH)]
    return [random.Random(id).randbytes(1_000_000) for id in range(BATCH)]


class Process:
    """What the kernel says of a process, in MB."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def rss(self) -> dict[str, float]:
        """All that is resident, and what of it is its own: pages of the object store count for whoever touched them."""
        lines = dict(line.split(":", 1) for line in (self._folder / "status").read_text().splitlines())
        names = {"all": "VmRSS", "own": "RssAnon"}
        return {name: int(lines[key].split()[0]) * 1024 / MB for name, key in names.items()}

    def processor(self) -> float:
        """Seconds of processors that it has used."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written(self) -> float:
        lines = dict(line.split(": ") for line in (self._folder / "io").read_text().splitlines())
        return int(lines["wchar"]) / MB


@asynccontextmanager
async def queues(folder: Path, store: int, memory: int, capacity: int) -> AsyncIterator[tuple[JournaledQueue, Process]]:
    """A queue on a Ray of its own, sizes in MiB, and the process of its journal."""
    options = {"address": "local", "num_cpus": 4, "object_store_memory": store << 20, "include_dashboard": False}
    with tempfile.TemporaryDirectory(dir=folder, prefix="queue-") as name:
        cluster = RayCluster(Session(options), Path(name), 120)
        queue = JournaledQueue(cluster, Path(name), memory << 20, capacity << 20, print)
        try:
            await queue.open()
            yield queue, Process(queue._worker.place.pid)  # type: ignore[union-attr]
        finally:
            await queue.close()
            await cluster.close()


class Passing:
    """Values on their way through a queue: once enough wait, the oldest ones are got and forgotten."""

    def __init__(self, queue: JournaledQueue, values: list[Any], batch: int, waiting: int) -> None:
        self._queue, self._values, self._next, self._waiting = queue, values, 0, deque[int]()
        self._batch, self._most = batch, waiting

    async def go(self, count: int) -> None:
        for _ in range(count):
            await self._queue.put(self._next, self._values[self._next % len(self._values)])
            self._waiting.append(self._next)
            self._next += 1
            if len(self._waiting) >= self._most:
                await self.take()

    async def take(self) -> None:
        ids = [self._waiting.popleft() for _ in range(self._batch)]
        for id, value in zip(ids, await self._queue.get(ids), strict=True):
            if type(value) is not type(self._values[0]):
                raise RuntimeError(f"{id} came back as another thing")
        await self._queue.forget(ids)

    async def written(self) -> None:
        while self._queue._pending or self._queue._flying.entries:  # sync would wait for the disk as well
            await asyncio.sleep(0.0005)


def bare(values: list[Any], count: int, waiting: deque[Any]) -> None:
    """The same with nothing but the object store."""
    import ray  # not before the session has told it what to print

    for i in range(count):
        waiting.append(ray.put(values[i % len(values)]))
        if len(waiting) >= WAITING:
            ray.get([waiting[n] for n in range(BATCH)])
            for _ in range(BATCH):
                waiting.popleft()


def disk(folder: Path, count: int, *, durable: bool) -> None:
    """As many MB in a plain file, in the page cache or on the disk itself."""
    data, path = random.Random(0).randbytes(1_000_000), folder / "plain"
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(data)
        if durable:
            os.fsync(file.fileno())
    path.unlink()


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


async def rate(folder: Path, name: str, pairs: int, count: int) -> dict[str, Any]:
    values = kind(name)
    took: dict[str, list[float]] = {key: [] for key in ("queue", "object store", "page cache", "disk")}
    busy: dict[str, list[float]] = {key: [] for key in ("object store", "queue, driver", "queue, journal")}
    async with queues(folder, 256, 64, 4096) as (queue, process):
        passing, waiting = Passing(queue, values, BATCH, WAITING), deque[Any]()
        await passing.go(2 * WAITING)
        bare(values, 2 * WAITING, waiting)
        before, done = process.written(), 0
        for _ in range(pairs):
            used = time.process_time()
            took["object store"].append(timed(lambda: bare(values, count, waiting)))
            busy["object store"].append(time.process_time() - used)
            began, used, its = time.perf_counter(), time.process_time(), process.processor()
            await passing.go(count)
            await passing.written()
            took["queue"].append(time.perf_counter() - began)
            busy["queue, driver"].append(time.process_time() - used)
            busy["queue, journal"].append(process.processor() - its)
            done += count
            took["page cache"].append(timed(lambda: disk(folder, count, durable=False)))
            took["disk"].append(timed(lambda: disk(folder, count, durable=True)))
        journal = (process.written() - before) / done
    ratios = [store / queue for store, queue in zip(took["object store"], took["queue"], strict=True)]
    rates = {f"{key}, MB/s": count / median(seconds) for key, seconds in took.items()}
    each = {f"{key}, ms of processor for each": median(used) / count * 1e3 for key, used in busy.items()}
    return rates | {"of the object store": median(ratios), "each": ratios} | each | {"MB written for each": journal}


async def through(process: Process, full: int, total: int, step: Callable[[int], Any]) -> dict[str, Any]:
    """Fill the queue, then go on in tenths: their rates, and what the queue's process and this one had after each."""
    here, rates, busy, before = Process(os.getpid()), [], [], process.written()
    theirs, ours = [process.rss()], [here.rss()]
    await step(full)
    theirs.append(process.rss())
    ours.append(here.rss())
    for _ in range(10):
        began, used = time.perf_counter(), here.processor() + process.processor()
        await step(total // 10)
        rates.append(total // 10 / (time.perf_counter() - began))
        busy.append((here.processor() + process.processor() - used) / (total // 10) * 1e3)
        theirs.append(process.rss())
        ours.append(here.rss())
    return {
        "groups": total,
        "first tenth, groups/s": rates[0],
        "last tenth, groups/s": rates[-1],
        "last of first": rates[-1] / rates[0],
        "first tenth, ms of processors a group": busy[0],
        "last tenth, ms of processors a group": busy[-1],
        "MB written": process.written() - before,
        "grown, MB": max(r["own"] for r in theirs) - theirs[0]["own"],
        "grown with pages of the object store, MB": max(r["all"] for r in theirs) - theirs[0]["all"],
        "grown since it was full, MB": max(r["all"] for r in theirs) - theirs[1]["all"],
        "driver grown since it was full, MB": max(r["all"] for r in ours) - ours[1]["all"],
        "tenths": {"groups/s": rates, "ms of processors": busy, "queue": theirs, "driver": ours},
    }


async def many(folder: Path, total: int) -> dict[str, Any]:
    """Groups of 2 kB, a thousand of them in the queue, and a sync after each tenth as a checkpoint asks for."""
    async with queues(folder, 256, 64, 4096) as (queue, process):
        passing = Passing(queue, [group(id, 100, 4) for id in range(64)], SMALL_BATCH, SMALL_WAITING)

        async def step(count: int) -> None:
            await passing.go(count)
            await queue.sync()

        return await through(process, SMALL_WAITING, total, step)


async def flow(folder: Path, store: int, memory: int, times: int) -> dict[str, Any]:
    """The queue's memory many times over. What waits is three times the memory, so most of it is read from the disk."""
    async with queues(folder, store, memory, 4 * memory) as (queue, process):
        passing = Passing(queue, kind("bytes"), BATCH, 3 * memory)
        found = await through(process, 3 * memory, times * memory, passing.go)
        return {"memory, MiB": memory, "times": times} | found


ROWS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "rate, groups": lambda a: rate(a.folder, "groups", a.pairs, a.count),
    "rate, bytes": lambda a: rate(a.folder, "bytes", a.pairs, 4 * a.count),
    "many": lambda a: many(a.folder, a.many),
    "flow": lambda a: flow(a.folder, a.store, a.memory, a.times),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| row | what | measured | bar |", "|---|---|---|---|"]
    for name, row in rows.items():
        for what, value in row.items():
            if isinstance(value, int | float):
                bar = BARS.get(what, "")
                lines.append(f"| {name} | {what} | {value:,.{0 if abs(value) > 100 else 2}f} | {bar} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--count", type=int, default=96, help="groups of 1 MB in a round; of bytes four times as many")
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--store", type=int, default=256, help="MiB of the object store in `flow`")
    parser.add_argument("--memory", type=int, default=64, help="MiB of the queue in `flow`")
    parser.add_argument("--times", type=int, default=48, help="how often that much goes through it")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the journal is")
    parser.add_argument("--out", type=Path, help="a path without suffix; .json and .md are written")
    args = parser.parse_args()
    about = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    told = args.out and args.out.with_suffix(".json")
    rows: dict[str, dict[str, Any]] = json.loads(told.read_text())["rows"] if told and told.exists() else {}
    for name in args.rows:
        load = os.getloadavg()[0]
        rows[name] = asyncio.run(ROWS[name](args)) | {"load": load}
        print(table({name: rows[name]}), flush=True)
        if told:
            told.write_text(json.dumps({"machine": about, "bars": BARS, "rows": rows}, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
