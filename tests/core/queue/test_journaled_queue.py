"""The queue above a journal that dies, whose disk only a sync finds full, or that is damaged under ``miles audit``."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from miles_core.cli import main
from miles_core.edges.identity import run_id
from miles_core.edges.protocols import Process, Worker, WorkerDied
from miles_core.edges.queue import queue as module
from miles_core.edges.queue.journal import Journal
from miles_core.edges.queue.queue import JournaledQueue
from miles_core.edges.store.folder import RunFolder
from miles_core.testing.threads import Threads

HOST = """
import importlib, pickle, struct, sys
source, sink = sys.stdin.buffer, sys.stdout.buffer
def take():
    size, = struct.unpack("<Q", source.read(8))
    return pickle.loads(source.read(size))
target, args = take()
module, _, name = target.partition(":")
made = getattr(importlib.import_module(module), name)(*args)
while True:
    method, args = take()
    try:
        answer = True, getattr(made, method)(*args)
    except Exception as error:
        answer = False, error
    data = pickle.dumps(answer, 5)
    sink.write(struct.pack("<Q", len(data)) + data)
    sink.flush()
"""


class Piped:
    """A real process, without Ray: it answers over a pipe, one call after the other."""

    def __init__(self, process: Process) -> None:
        self.name = process.name
        self._busy = asyncio.Lock()
        self.process = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send((process.target, process.args))

    def _send(self, what: Any) -> None:
        assert self.process.stdin
        data = pickle.dumps(what, 5)
        self.process.stdin.write(struct.pack("<Q", len(data)) + data)
        self.process.stdin.flush()

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        assert self.process.stdout
        try:
            self._send((method, args))
            (size,) = struct.unpack("<Q", self.process.stdout.read(8))
            fine, answer = pickle.loads(self.process.stdout.read(size))
        except (OSError, struct.error, EOFError, pickle.UnpicklingError) as error:
            raise WorkerDied(f"{self.name} died") from error
        if not fine:
            raise answer
        return answer

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        async with self._busy:
            return await asyncio.to_thread(self.ask, method, *args)

    async def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Piping:
    """A cluster of such processes; what is shared stays in this one."""

    def __init__(self) -> None:
        self.workers: list[Piped] = []

    async def start(self, process: Process) -> Worker:
        self.workers.append(Piped(process))
        return self.workers[-1]

    async def share(self, value: Any) -> Any:
        return bytearray(value)

    async def fetch(self, references: list[Any]) -> list[Any]:
        return references


def with_queue(folder: Path, work: Callable[[JournaledQueue, Piping, list[str]], Coroutine[Any, Any, Any]]) -> Any:
    async def go() -> Any:
        cluster, said = Piping(), list[str]()
        queue = JournaledQueue(cluster, folder, 1 << 18, 1 << 24, said.append)  # type: ignore[arg-type]
        try:
            await queue.open()
            return await asyncio.wait_for(work(queue, cluster, said), 60)
        finally:
            await queue.close()
            for worker in cluster.workers:
                await worker.kill()

    return asyncio.run(go())


def group(id: int) -> bytes:
    return bytes([id % 251]) * (id * 7919 % 100_000)  # some travel in the call, some by reference; most are spilled


def test_a_process_that_is_killed_again_and_again_loses_nothing_that_was_put(tmp_path: Path) -> None:
    async def fill(queue: JournaledQueue, cluster: Piping, said: list[str]) -> set[int]:
        draw, live, id = random.Random(3), set[int](), 0
        for _ in range(2):
            dying = asyncio.get_running_loop().call_later(draw.random() / 20, cluster.workers[-1].process.kill)
            while dying.when() > asyncio.get_running_loop().time():
                id += 1
                await queue.put(id, group(id))
                live.add(id)
                if len(live) > 60:
                    gone = draw.sample(sorted(live), 20)
                    await queue.forget(gone)
                    live -= set(gone)
            await queue.sync()
            assert await queue.get(sorted(live)) == [group(n) for n in sorted(live)]
        assert len(said) >= 2 and "lost" not in "".join(said)
        await queue.sync()
        cluster.workers[-1].process.kill()  # and the queue here ends with it: nothing of it is used below
        return live

    async def find(queue: JournaledQueue, cluster: Piping, said: list[str]) -> None:
        assert await queue.get(sorted(live)) == [group(n) for n in sorted(live)]
        assert not said

    live = with_queue(tmp_path, fill)
    assert live
    with_queue(tmp_path, find)


def test_a_disk_that_only_a_sync_finds_full_is_waited_for_and_what_it_lost_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    fsync, failed = os.fsync, []

    def forgetful(handle: int) -> None:
        if len(failed) < 2:
            failed.append(handle)
            path = max((tmp_path / "queue").glob("*.seg"))
            with path.open("r+b") as file:  # the kernel gives up what it could not write
                file.seek(200)
                file.write(bytes(path.stat().st_size - 200))
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    async def work() -> list[str]:
        cluster, said = Threads(), list[str]()
        queue = JournaledQueue(cluster, tmp_path, 1 << 20, 1 << 20, said.append)
        try:
            await queue.open()
            for id in range(1, 9):
                await queue.put(id, [id] * 100)
            await queue.sync()
            for id in range(9, 20):
                await queue.put(id, [id] * 100)
            monkeypatch.setattr(os, "fsync", forgetful)
            await asyncio.wait_for(queue.sync(), 10)
            assert await queue.get(list(range(1, 20))) == [[id] * 100 for id in range(1, 20)]
        finally:
            await queue.close()
        return said

    said = asyncio.run(work())
    assert len(failed) == 2 and len(said) == 2 and "waits for room" in said[0] and "room again" in said[1]
    journal = Journal(str(tmp_path / "queue"), 1 << 20, run_id(tmp_path))
    found, cut = journal.open()
    assert sorted(found) == list(range(1, 20)) and not cut
    assert [pickle.loads(data) for data in journal.read(list(found))] == [[id] * 100 for id in found]
    journal.close()


def miles(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_audit_salvages_the_queue_beside_the_ledger(tmp_path: Path) -> None:
    store = RunFolder(tmp_path, 1)
    store.claim(resume=False)
    store.ledger(print).close()
    journal = Journal(str(tmp_path / "queue"), 1 << 20, run_id(tmp_path))
    journal.open()
    journal.write([], [1, 2, 3], [b"1" * 50, b"2" * 50, b"3" * 50])
    journal.sync()
    journal.close()
    assert "3 groups; there is nothing to salvage" in miles("audit", tmp_path, "--salvage").output
    (path,) = (tmp_path / "queue").glob("*.seg")
    path.write_bytes(path.read_bytes().replace(b"2222", b"2x22", 1))
    done = miles("audit", tmp_path, "--salvage")
    assert done.exit_code == 0, done.output
    assert "the checksum of group 2 is wrong" in done.output and "2 groups of the queue are kept" in done.output
    journal = Journal(str(tmp_path / "queue"), 1 << 20, run_id(tmp_path))
    assert journal.open() == ({1: 50, 3: 50}, [])
    journal.close()
