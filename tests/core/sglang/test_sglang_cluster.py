"""Engines as they run for real: each in a process of its own that Ray started, asked from another."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from miles_core.edges.cluster.cluster import RayCluster
from miles_core.edges.cluster.session import Session
from miles_core.edges.protocols import EngineError, Process, TransportError, everyone
from miles_core.edges.sglang.client import SGLangClient
from sglang_cases import SERVER, assert_whole, group, weights

LOCAL = {"address": "local", "num_cpus": 4, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(Session(LOCAL), tmp_path, 60)
    yield cluster
    asyncio.run(cluster.close())


def processes(n: int) -> list[Process]:
    command = (sys.executable, SERVER, "--dialect", "0.5.23")
    args = (("--model-path", "some"), 30.0, 30.0, "gloo", 0, False, True, False, 60.0, command, "127.0.0.1")
    target = "miles_core.edges.sglang.server:SGLangEngine"
    return [Process(f"engine-{i}", target, args, cpus=0.1) for i in range(n)]


def servers() -> set[str]:
    """The processes of stand-in servers, guards left out."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if SERVER.encode() in words and b"guard.py" not in words:
            found.add(path.parent.name)
    return found


@pytest.mark.slow
def test_engines_of_a_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    before = servers()

    async def go() -> None:
        workers = list(await asyncio.gather(*map(cluster.start, processes(2))))
        client = SGLangClient(workers, 20)
        groups = [group(g, 4, tokens=30) for g in range(8)]

        async def check(version: int) -> None:
            for requests in groups:
                for request, completion in zip(requests, await client.generate(requests), strict=True):
                    assert_whole(request, completion, [version] * 30)

        await check(0)
        await everyone(workers, "begin_update", 2)
        await everyone(workers, "load", weights(a=2, b=2))
        await everyone(workers, "end_update")
        await check(2)
        assert len(servers() - before) == 2
        assert "The server is fired up" in (tmp_path / "logs" / "engine-0.log").read_text()
        # Errors arrive as what they are.
        with pytest.raises(TransportError, match="end_update without begin_update"):
            await workers[0].call("end_update")
        await workers[0].kill()  # its process, with SIGKILL
        async with asyncio.timeout(5):
            while len(servers() - before) > 1:
                await asyncio.sleep(0.02)
        await check(2)
        await workers[1].call("begin_update", 1)
        await workers[1].call("load", weights(a=3))
        await workers[1].call("abort_update")
        with pytest.raises(EngineError, match="was cut short; its successor serves nothing until whole weights arrive"):
            while True:
                await workers[1].call("address")
                await asyncio.sleep(0.05)

    asyncio.run(go())
    asyncio.run(cluster.close())
    assert not servers() - before


@pytest.mark.slow
def test_closing_a_cluster_leaves_no_server(cluster: RayCluster) -> None:
    """As every run ends: nobody tells the engine, and Ray kills its process and that one's children."""
    before = servers()

    async def go() -> None:
        [process] = processes(1)
        await (await cluster.start(process)).call("ready")
        assert len(servers() - before) == 1
        await cluster.close()
        async with asyncio.timeout(5):
            while servers() - before:
                await asyncio.sleep(0.02)

    asyncio.run(go())
