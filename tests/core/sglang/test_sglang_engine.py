"""The engine's process and its server: how it starts, is watched, and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from miles_core.edges.protocols import EngineError
from miles_core.edges.sglang import launch
from miles_core.edges.sglang.process import ServerProcess, free_port
from sglang_cases import SERVER, InProcess, calls, engine, engines, fault, live, push, until

ENGINE = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from sglang_cases import engine, live, InProcess
async def go():
    worker = InProcess("engine-0", engine("0.5.16"))
    print((await live(worker)).process._process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(go())
"""


def members(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, pgrp = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == leader and state != "Z":
            found.append(int(name))
    return found


def leader_of(server: launch.Live) -> int:
    return server.process._process.pid


# -- starting --------------------------------------------------------------------------------------------------------


def test_a_server_comes_up_and_is_known(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            with pytest.raises(EngineError, match="its server is starting"):
                await worker.engine.address()
            assert (await worker.engine.health())["refuses"] == "its server is starting"
            server = await live(worker)
            assert await worker.engine.address() == f"{server.url}#{server.mark}"
            assert server.sessions == (dialect == "0.5.23")
            assert await worker.engine.health() == {
                "version": 0,
                "running": 0,
                "waiting": 0,
                "restarts": 0,
                "release": dialect,
                "refuses": "",
                "stale": False,
            }

    asyncio.run(go())


def test_a_server_that_dies_while_it_starts_says_why() -> None:
    async def go() -> None:
        async with engines("0.5.16", "--die") as [worker]:
            for call in (worker.engine.begin_update(1), worker.engine.pause(), worker.engine.checksums()):
                with pytest.raises(EngineError, match="ended while it was starting") as error:
                    await call
                assert "RuntimeError: no kernel image is available" in str(error.value)
                assert "the server ended with status 1" in str(error.value)
            assert "no kernel image" in (await worker.engine.health())["refuses"]
            with pytest.raises(EngineError, match="no kernel image"):
                await worker.engine.address()

    asyncio.run(go())


def test_a_command_that_is_not_there_says_so() -> None:
    async def go() -> None:
        started = time.monotonic()
        with pytest.raises(EngineError, match="the server cannot be started: sglang-that-is-not: No such file"):
            await launch.launch(["sglang-that-is-not"], "127.0.0.1", 20)
        assert time.monotonic() - started < 10

    asyncio.run(go())


@pytest.mark.parametrize("options", [("--slow-s", "60"), ("--load-s", "60")], ids=["not ready", "not listening"])
def test_a_server_that_is_never_well_is_given_up(options: tuple[str, str]) -> None:
    async def go() -> None:
        async with engines("0.5.16", *options, start_s=1.0) as [worker]:
            starting = worker.engine._starting
            with pytest.raises(EngineError, match="is not well after 1 s"):
                await asyncio.wait_for(asyncio.shield(starting), 10)
        assert not subprocess.run(["pgrep", "-f", f"{SERVER} .*{options[0]} 60"], capture_output=True).stdout

    asyncio.run(go())


def test_a_port_that_was_taken_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch, dialect: str) -> None:
    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:  # accepts, and never answers
            taken = other.getsockname()[1]
            ports = iter([taken, taken])
            monkeypatch.setattr(launch, "free_port", lambda host: next(ports, None) or free_port(host))
            monkeypatch.setattr(launch, "KNOWN_S", 0.3)
            async with engines(dialect) as [worker]:
                assert (await live(worker)).url != f"http://127.0.0.1:{taken}"

    asyncio.run(go())


def test_a_leftover_server_is_never_talked_to(monkeypatch: pytest.MonkeyPatch, dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [leftover]:
            taken = int((await live(leftover)).url.rpartition(":")[2])
            before = await calls(leftover)
            ports = iter([taken])
            monkeypatch.setattr(launch, "free_port", lambda host: next(ports, None) or free_port(host))
            began = time.monotonic()
            # The second one would load for 3 s before it found its port taken.
            async with engines(dialect, "--load-s", "3") as [worker]:
                server = await live(worker)
                assert server.url != (await live(leftover)).url and time.monotonic() - began < 6
                await push(worker, 1)
            heard = (await calls(leftover))[len(before) :]
            assert [path for path in heard if path != "/v1/loads"] == ["/model_info"]  # that one its own engine asks

    asyncio.run(go())


def test_no_port_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with engines("0.5.16") as [leftover]:
            taken = int((await live(leftover)).url.rpartition(":")[2])
            monkeypatch.setattr(launch, "free_port", lambda host: taken)
            async with engines("0.5.16") as [worker]:
                with pytest.raises(EngineError, match="found no port on 127.0.0.1: 5 that were free were taken"):
                    await live(worker)

    asyncio.run(go())


# -- being watched ---------------------------------------------------------------------------------------------------


def kill_server(server: launch.Live) -> None:
    """The server alone, neither its guard nor what it started."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(leader_of(server))}
    [pid] = [pid for pid, words in commands.items() if b"--port" in words and b"guard.py" not in words]
    os.kill(pid, signal.SIGKILL)


def kill_guard(server: launch.Live) -> None:
    os.kill(leader_of(server), signal.SIGKILL)


@pytest.mark.parametrize("murder", [kill_server, kill_guard])
def test_a_server_that_dies_is_replaced_and_nothing_of_it_is_left(murder: Any) -> None:
    async def go() -> None:
        async with engines("0.5.23") as [worker]:
            first = await live(worker)
            assert len(members(leader_of(first))) == 4  # two guards, the server and what it started
            murder(first)
            await until(lambda: worker.engine._restarts)
            second = await live(worker)
            assert not members(leader_of(first)) and len(members(leader_of(second))) == 4
            assert await worker.engine.address() == second.address != first.address  # version 0 is what is on disk
        assert not members(leader_of(second))

    asyncio.run(go())


def test_a_server_known_to_be_gone_is_not_alive() -> None:
    """Its pipe closes first, and whoever asked in between took it for alive; many at once, since one is quick."""

    async def once() -> None:
        process = ServerProcess(["true"])
        await process.ended.wait()
        assert not process.alive

    async def go() -> None:
        for _ in range(12):
            await asyncio.gather(*(once() for _ in range(8)))

    asyncio.run(go())


def test_an_update_of_a_server_that_just_died_goes_to_its_successor(dialect: str) -> None:
    """However many tries follow each other at once, as the loop's do: a second one waits for the successor."""

    async def go() -> None:
        async with engines(dialect) as [worker]:
            await push(worker, 1)
            kill_server(await live(worker))
            with suppress(EngineError):
                await worker.engine.begin_update(1)
            await push(worker, 2)
            assert worker.engine._restarts == 1 and (await worker.engine.health())["version"] == 2

    asyncio.run(go())


def test_the_successor_of_newer_weights_serves_nothing_until_whole_ones_arrived(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await push(worker, 3)
            kill_server(await live(worker))
            await until(lambda: worker.engine._restarts)
            await live(worker)
            with pytest.raises(EngineError, match="its server died(.|\n)*; its successor serves nothing until whole"):
                await worker.engine.address()
            state = await worker.engine.health()
            assert state["stale"] and state["version"] == 3 and "its server died" in state["refuses"]
            await push(worker, 3)
            assert (await worker.engine.health())["refuses"] == ""
            assert await worker.engine.address() == (await live(worker)).address

    asyncio.run(go())


def test_a_server_that_hangs_is_replaced() -> None:
    async def go() -> None:
        async with engines("0.5.16", hang_s=0.4) as [worker]:
            first = await live(worker)
            await asyncio.sleep(1.5)
            assert await live(worker) is first  # it answers
            await fault(worker, hang=True)
            await until(lambda: worker.engine._restarts)
            assert (await live(worker)).address != first.address and not members(leader_of(first))

    asyncio.run(go())


def test_a_server_that_cannot_leave_a_group_is_replaced() -> None:
    """Its GPU may wait for a broadcast of a rank that is gone, and its scheduler for its GPU."""

    async def go() -> None:
        async with engines("0.5.16", hang_s=0.4, timeout_s=600) as [worker]:
            worker.engine._groups["group"] = await live(worker)
            await fault(worker, hang=True)
            with pytest.raises(EngineError):
                await worker.engine.leave("group")
            assert worker.engine._restarts == 1

    asyncio.run(go())


def test_a_scheduler_may_be_silent_while_it_takes_weights() -> None:
    async def go() -> None:
        async with engines("0.5.23", hang_s=0.2) as [worker]:
            await worker.engine.begin_update(1)
            await fault(worker, hang=True)
            await asyncio.sleep(2.5)
            assert not worker.engine._restarts
            await worker.engine.abort_update()
            assert worker.engine._restarts == 1  # it does not answer, and so is replaced

    asyncio.run(go())


def test_whoever_got_no_answer_has_the_server_replaced_once() -> None:
    async def go() -> None:
        async with engines("0.5.16") as [worker]:
            first = await worker_address(worker)
            await worker.engine.restart("http://127.0.0.1:1#else", "not this one")
            assert not worker.engine._restarts
            await asyncio.gather(*(worker.engine.restart(first, "no answer") for _ in range(3)))
            assert worker.engine._restarts == 1
            assert await worker_address(worker) != first

    asyncio.run(go())


async def worker_address(worker: InProcess) -> str:
    await live(worker)
    return await worker.engine.address()


# -- ending ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_engine_that_was_killed() -> None:
    script = ENGINE.format(folder=str(Path(SERVER).parent))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    leader = next(int(line) for line in process.stdout if line.strip().isdigit())
    assert len(members(leader)) == 4
    process.kill()
    deadline = time.monotonic() + 5
    while members(leader) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not members(leader)
    process.wait()


def test_closing_while_the_server_starts_leaves_nothing() -> None:
    async def go() -> None:
        made = engine("0.5.16", "--load-s", "61")
        await asyncio.sleep(0.5)
        await made.close()
        assert not subprocess.run(["pgrep", "-f", f"{SERVER} .*--load-s 61"], capture_output=True).stdout

    asyncio.run(go())


@pytest.mark.parametrize("after_s", [0, 0.1])
def test_closing_while_the_server_is_replaced_waits_for_the_old_one(after_s: float) -> None:
    async def go() -> None:
        async with engines("0.5.16") as [worker]:
            old = await live(worker)
            kill, gone = old.process.kill, []

            def slowly() -> None:
                time.sleep(0.5)
                kill()
                gone.append(old)

            old.process.kill = slowly  # type: ignore[method-assign]
            await worker.engine.restart(old.address, "no answer")
            await asyncio.sleep(after_s)
            await worker.engine.close()
            assert gone

    asyncio.run(go())
