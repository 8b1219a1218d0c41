"""What is done behind training is done in its order, one list at a time, and tells what went wrong."""

import asyncio
import errno
import os
import threading
from concurrent.futures import Future

import pytest
from miles_core.edges import lasting
from miles_core.edges.protocols import Behind, Process, writing
from miles_core.testing.threads import Threads


def test_tasks_run_in_another_thread_in_their_order():
    behind, go, seen = Behind(), threading.Event(), []
    assert behind.done.result() is None
    behind.start([go.wait, lambda: seen.append(threading.get_ident()), lambda: seen.append(2)])
    assert not behind.done.done()
    go.set()
    behind.done.result(5)
    assert seen[1:] == [2] and seen[0] != threading.get_ident()


def test_only_its_own_thread_yields():
    behind, seen = Behind(), []
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    behind.start([lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))])
    behind.done.result(5)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    assert seen == [max(mine, min(mine + 10, 19))] or seen == [10]


def test_a_failure_ends_the_list_and_is_kept(tmp_path):
    behind, seen = Behind(), []
    behind.start([writing(tmp_path, "is a folder"), lambda: seen.append(1)])
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path}'"):
        behind.done.result(5)
    assert not seen


def test_a_full_disk_is_told_with_its_path(tmp_path):
    (tmp_path / "state.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/state.json'") as raised:
        writing(tmp_path / "state.json", "{}" * 10_000)()
    assert raised.value.errno == errno.ENOSPC
    writing(tmp_path / "made" / "state.json", "{}")()
    assert (tmp_path / "made" / "state.json").read_text() == "{}"


def test_a_list_goes_on_with_the_task_that_failed(tmp_path):
    behind, seen, full = Behind(), [], [OSError(errno.ENOSPC, "full")] * 2

    def task():
        seen.append("tried")
        if full:
            raise full.pop()

    behind.start([lambda: seen.append("first"), task, lambda: seen.append("last")])
    for _ in range(2):
        assert isinstance(behind.done.exception(5), OSError)
        behind.go_on()
    behind.done.result(5)
    assert behind.go_on().result(5) is None and seen == ["first", "tried", "tried", "tried", "last"]


def test_who_insists_asks_until_there_is_room_and_says_so_once(monkeypatch):
    monkeypatch.setattr(lasting, "PAUSE", 0.01)
    said, errors = [], [OSError(errno.ENOSPC, "full", "/disk"), OSError(errno.EDQUOT, "quota", "/disk")]

    async def ask(what):
        if errors:
            raise errors.pop()
        return what

    assert asyncio.run(lasting.insist(lambda text: said.append(text), ask, "whole")) == "whole"
    assert said == ["/disk: quota; the run waits until there is room", said[1]]
    assert said[1] == "/disk: there is room again after 0 s; the run goes on"
    errors.append(OSError(errno.EIO, "broken", "/disk"))
    with pytest.raises(OSError, match="broken"):
        asyncio.run(lasting.insist(lambda text: said.append(text), ask, "whole"))
    assert len(said) == 2


def test_who_insists_can_be_cancelled():
    async def ask():
        raise OSError(errno.ENOSPC, "full", "/disk")

    async def go():
        await asyncio.wait_for(lasting.insist(lambda text: None, ask), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(go())


class Later:
    def later(self, fails):
        future = Future()
        end = future.set_exception if fails else future.set_result
        threading.Timer(0.05, end, [OSError("/disk: full") if fails else "written"]).start()
        return future


def test_the_kits_processes_answer_a_future_too():
    async def asked():
        worker = await Threads().start(Process("later", f"{__name__}:Later"))
        assert await worker.call("later", False) == worker.ask("later", False) == "written"
        with pytest.raises(OSError, match="/disk: full"):
            await worker.call("later", True)
        await worker.kill()

    asyncio.run(asked())
