"""Groups that wait: in order, within their room, and there again after whoever held them is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.queue.journal import Journal
from miles_core.edges.queue.queue import JournaledQueue
from miles_core.edges.queue.segment import LABEL, header, scan
from miles_core.testing.threads import Threads
from miles_core.types import Group, Refused, Sample


def group(id: int, tokens: int = 50) -> Group:
    return Group(id, [Sample(tokens=list(range(tokens)), versions=[id] * tokens, id=f"{id}/0")])


def with_queue(
    folder: Path, work: Callable[[JournaledQueue], Coroutine[Any, Any, Any]], capacity: int = 1 << 20
) -> Any:
    async def go() -> Any:
        cluster, said = Threads(), list[str]()
        queue = JournaledQueue(cluster, folder, 1 << 14, capacity, said.append)
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
        return await queue.get(list(range(30, 40))), queue.used[0]

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
