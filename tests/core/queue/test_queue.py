"""Groups that wait: in order, within their room, and there again after whoever held them is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.queue import entry
from miles_core.edges.queue import queue as module
from miles_core.edges.queue.journal import Journal
from miles_core.edges.queue.queue import JournaledQueue
from miles_core.edges.queue.segment import LABEL, header, scan
from miles_core.testing.threads import Threads
from miles_core.types import Group, Refused, Sample


def group(id: int, tokens: int = 50) -> Group:
    return Group(id, [Sample(tokens=list(range(tokens)), versions=[id] * tokens, id=f"{id}/0")])


def with_queue(
    folder: Path,
    work: Callable[[JournaledQueue], Coroutine[Any, Any, Any]],
    capacity: int = 1 << 20,
    said: list[str] | None = None,
) -> Any:
    async def go() -> Any:
        cluster = Threads()
        queue = JournaledQueue(cluster, folder, 1 << 14, capacity, print if said is None else said.append)
        try:
            await queue.open()
            return await work(queue)
        finally:
            await queue.close()
            await cluster.close()

    return asyncio.run(go())


def test_what_was_put_comes_back_in_the_order_asked_for(tmp_path: Path) -> None:
    async def work(queue: JournaledQueue) -> None:
        for id in range(1, 200):  # several times the memory it is given
            await queue.put(id, group(id))
        assert await queue.get([7, 190, 3]) == [group(7), group(190), group(3)]
        assert await queue.get([3]) == [group(3)]  # it stays until it is forgotten
        await queue.forget([3])
        with pytest.raises(LookupError, match="group 3"):
            await queue.get([3])
        with pytest.raises(ValueError, match="group 7"):
            await queue.put(7, group(7))

    with_queue(tmp_path, work)


def test_another_process_of_the_run_finds_what_was_not_forgotten(tmp_path: Path) -> None:
    async def fill(queue: JournaledQueue) -> None:
        for id in range(1, 40):
            await queue.put(id, group(id))
        await queue.forget(range(1, 30))
        await queue.sync()

    async def find(queue: JournaledQueue) -> Any:
        used = queue.used[0]
        return await queue.get(list(range(30, 40))), used

    with_queue(tmp_path, fill)
    found, used = with_queue(tmp_path, find)
    assert found == [group(id) for id in range(30, 40)] and used > 0


def test_a_full_queue_waits_and_one_that_can_never_take_a_group_is_refused(tmp_path: Path) -> None:
    async def work(queue: JournaledQueue) -> None:
        await queue.put(1, group(1, 2000))
        waiting = asyncio.ensure_future(queue.put(2, group(2, 2000)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await queue.forget([1])
        await asyncio.wait_for(waiting, 5)
        with pytest.raises(Refused, match="queue.capacity_mib"):
            await queue.put(3, group(3, 20_000))

    with_queue(tmp_path, work, capacity=20_000)


def test_what_the_trainer_has_takes_no_room_of_what_waits(tmp_path: Path) -> None:
    async def work(queue: JournaledQueue) -> None:
        for id in range(1, 9):  # each fills the queue by itself, and none is forgotten
            assert await asyncio.wait_for(queue.put(id, group(id, 3000)), 5) < 1.0
            assert queue.used[0] > queue.used[1] / 2
            assert await queue.get([id]) == [group(id, 3000)]
        assert queue.used[0] == 0 and await queue.get([1, 8]) == [group(1, 3000), group(8, 3000)]
        await queue.forget(range(1, 9))
        assert queue.used[0] == 0

    with_queue(tmp_path, work, capacity=20_000)


def test_a_full_queue_that_the_trainer_cannot_go_on_with_is_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    needed = 0

    async def work(queue: JournaledQueue) -> None:
        nonlocal needed
        await queue.put(1, group(1, 80_000))
        size = queue.used[0]
        await queue.put(2, group(2, 80_000))
        waiting = asyncio.ensure_future(queue.put(3, group(3, 80_000), lambda: needed))
        await asyncio.sleep(0.3)
        assert not waiting.done()  # the trainer is busy: back-pressure
        needed = 7  # a trainer that waits tells nobody
        with pytest.raises(Refused, match="queue.capacity_mib = 1 ") as refused:
            await asyncio.wait_for(waiting, 5)
        told = str(refused.value)
        assert f"full with 2 groups of {2 * size:,} bytes" in told and f"group 3 takes {size:,} more" in told
        assert "none before 7 wait" in told and f"{1 << 20:,} bytes" in told
        enough = int(told.split("raise it to ")[1].split()[0]) << 20
        assert 2 * 7 * size <= enough < 2 * 7 * size + (1 << 20)
        before = queue.used[0]
        assert await asyncio.wait_for(queue.put(4, group(4, 80_000), lambda: None), 5) < 0.02
        assert queue.used[0] == before + size > queue.used[1]  # what cannot wait does not

    with_queue(tmp_path, work, capacity=1 << 20)


def test_back_pressure_is_said_once_and_its_seconds_are_counted(tmp_path: Path) -> None:
    async def work(queue: JournaledQueue) -> float:
        waited = await queue.put(1, group(1, 3000))
        for id in (2, 3):
            asyncio.get_running_loop().call_later(0.2, lambda id=id: asyncio.ensure_future(queue.get([id - 1])))
            waited += await asyncio.wait_for(queue.put(id, group(id, 3000)), 5)
        return waited

    said = list[str]()
    assert with_queue(tmp_path, work, capacity=20_000, said=said) >= 0.35
    assert len(said) == 1 and "the queue is full" in said[0] and "queue.capacity_mib" in said[0]


def test_all_of_it_is_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fill(queue: JournaledQueue) -> None:
        for id in range(1, 60):
            await queue.put(id, group(id))

    async def find(queue: JournaledQueue) -> None:
        asked: list[int] = []
        read = Journal.read
        monkeypatch.setattr(Journal, "read", lambda journal, ids: (asked.append(len(ids)), read(journal, ids))[1])
        used, found = queue.used[0], []
        async for value in queue.each():
            found.append(value)
            assert sum(asked) < len(found) + max(asked)
        assert sorted(found, key=lambda one: one.id) == [group(id) for id in range(1, 60)]
        assert len(asked) > 5 and queue.used[0] == used  # they wait as before

    with_queue(tmp_path, fill)
    monkeypatch.setattr(entry, "BATCH", 4000)
    with_queue(tmp_path, find)


def written(folder: Path, sizes: list[int]) -> Path:
    journal = Journal(str(folder), 1 << 20, "one")
    journal.open()
    journal.write([], list(range(len(sizes))), [bytes([i % 251]) * size for i, size in enumerate(sizes)])
    journal.close()
    return next(folder.glob("*.seg"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.data())
def test_cut_anywhere_every_record_before_the_cut_is_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("cut"), sizes)
    whole = path.stat().st_size
    cut = data.draw(st.integers(0, whole))
    with path.open("r+b") as file:
        file.truncate(cut)
    ends, at = [], LABEL
    for i, size in enumerate(sizes):
        at += len(header(i, b"")) + size
        ends.append(at)
    found = scan(path)
    assert [head.id for _, head in found.records] == [i for i, end in enumerate(ends) if end <= cut]
    assert bool(found.flaws) == (cut not in (0, LABEL, *ends))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.data())
def test_one_damaged_byte_costs_one_record_at_most(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("damaged"), sizes)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    ids = [head.id for _, head in scan(path).records]
    assert len(ids) >= len(sizes) - 1 and set(ids) <= set(range(len(sizes)))
