"""Weights from one process to engines in others: what is sent is what arrives, and no memory is left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.config import RunConfig
from miles_core.edges.local.segments import attached
from miles_core.edges.protocols import Bucket, TransportError, WorkerDied
from miles_core.edges.transport import SharedMemory
from miles_core.edges.transport.shm import SharedMemoryTransport
from miles_core.types import Layout

LAYOUT = Layout(rank=0, world=1, dp_rank=0, dp_size=1, last_stage=True, reports=True)


class Receiver:
    """A worker that loads buckets as an engine does: by name, into its own memory, checksums read back from there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}
        self.buckets: list[Bucket] = []
        self.damage = ""  # a tensor to spoil between the segment and its own memory
        self.error: Exception | None = None
        self.delay = 0.0
        self.loading = 0

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        assert method == "load"
        self.loading += 1
        try:
            time.sleep(self.delay)
            if self.error:
                raise self.error
            return self._load(args[0])
        finally:
            self.loading -= 1

    def _load(self, bucket: Bucket) -> dict[str, int]:
        self.buckets.append(bucket)
        checksums = {}
        with attached(bucket.segment) as memory:
            for piece in bucket.pieces:
                data = bytearray(memory[piece.offset : piece.offset + piece.length])
                if piece.name == self.damage:
                    data[-1] ^= 1
                dtype = getattr(torch, piece.dtype)
                assert piece.name not in self.tensors
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                self.tensors[piece.name] = flat.view(piece.shape)
                if piece.checksum is not None:
                    checksums[piece.name] = zlib.crc32(data)
        return checksums

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await asyncio.to_thread(self.ask, method, *args)

    async def kill(self) -> None: ...


def segments() -> list[str]:
    """The shared memory this process holds open or mapped."""
    fds = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [text for text in (*fds, *maps) if "miles-weights" in text]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not segments()


def connected(engines: list[Any], size: int = 4096) -> SharedMemoryTransport:
    sender = SharedMemoryTransport(size, timeout_s=10.0)
    sender.connect(engines, LAYOUT)
    return sender


def some_tensors(sizes: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {f"w{i}": torch.randn(n, generator=generator).to(dtypes[i % 3]) for i, n in enumerate(sizes)}


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 3000), max_size=12), bucket=st.integers(64, 8192), verify=st.booleans())
def test_what_is_sent_arrives(sizes: list[int], bucket: int, verify: bool) -> None:
    engines, tensors = [Receiver("engine-0"), Receiver("engine-1")], some_tensors(sizes)
    sender = connected(engines, bucket)
    metrics = sender.send(iter(tensors.items()), verify, servers=[""])
    sender.close()
    assert metrics == {"bytes": float(sum(t.nbytes for t in tensors.values())), "tensors": float(len(sizes))}
    for engine in engines:
        assert engine.tensors.keys() == tensors.keys()
        assert all(torch.equal(engine.tensors[name], tensor) for name, tensor in tensors.items())


def test_two_segments_serve_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Receiver("engine-0")
    sender = connected([engine])
    for _ in range(3):
        engine.tensors.clear()
        sender.send(iter(some_tensors([700] * 9).items()), verify=True, servers=[""])
    assert len(engine.buckets) >= 12
    assert len({bucket.segment for bucket in engine.buckets}) == 2
    sender.close()
    sender.close()


def test_a_tensor_larger_than_a_bucket_gets_its_own() -> None:
    engine, tensors = Receiver("engine-0"), some_tensors([10, 50_000, 10])
    sender = connected([engine])
    sender.send(iter(tensors.items()), verify=True, servers=[""])
    assert [[piece.name for piece in bucket.pieces] for bucket in engine.buckets] == [["w1"], ["w0", "w2"]]
    assert torch.equal(engine.tensors["w1"], tensors["w1"])
    assert len([text for text in segments() if "rw-s" in text]) == 1  # the bucket is kept, the large one is gone
    sender.close()


def test_strided_tensors_and_reused_storage() -> None:
    """An exporter may hand out views, and fill the same buffer again once the next tensor is asked for."""
    engine, buffer = Receiver("engine-0"), torch.empty(8, 6)

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            buffer.copy_(torch.arange(48.0).view(8, 6) + i)
            yield f"t{i}", buffer.t()[::2]

    sender = connected([engine], 300)
    sender.send(exported(), verify=True, servers=[""])
    sender.close()
    for i in range(5):
        assert torch.equal(engine.tensors[f"t{i}"], (torch.arange(48.0).view(8, 6) + i).t()[::2])


def test_one_bucket_is_filled_while_the_other_is_loaded() -> None:
    engine = Receiver("engine-0")
    engine.delay = 0.2
    seen: list[int] = []

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in some_tensors([1024] * 4).items():
            seen.append(engine.loading)
            yield name, tensor

    sender = connected([engine], 4096)
    sender.send(exported(), verify=False, servers=[""])
    sender.close()
    assert max(seen) == 1


def test_a_damaged_tensor_is_named_with_its_engine() -> None:
    engines = [Receiver("engine-0"), Receiver("engine-1")]
    engines[1].damage = "w3"
    sender = connected(engines)
    with pytest.raises(TransportError, match="w3 did not arrive in engine-1 as it was sent: crc32 [0-9a-f]{8}, sent"):
        sender.send(iter(some_tensors([100] * 8).items()), verify=True, servers=[""])
    engines = [Receiver("engine-0")]  # the next update is not spoiled by the last one
    sender.connect(engines, LAYOUT)
    sender.send(iter(some_tensors([100] * 8).items()), verify=True, servers=[""])
    assert len(engines[0].tensors) == 8
    sender.close()


@pytest.mark.parametrize("error", [WorkerDied("engine-1 is gone"), TransportError("w0: no such weight")])
def test_an_engine_that_fails_is_named_and_nobody_reads_afterwards(error: Exception) -> None:
    engines = [Receiver("engine-0"), Receiver("engine-1")]
    engines[1].error, engines[0].delay = error, 0.2
    sender = connected(engines)
    with pytest.raises(TransportError, match=f"engine-1 did not load w0 .* {type(error).__name__}: {error}"):
        sender.send(iter(some_tensors([600] * 6).items()), verify=False, servers=[""])
    assert engines[0].loading == 0
    assert not engines[0].error and len(engines[0].tensors) >= 1
    sender.close()


def test_an_exporter_that_raises_leaves_nothing() -> None:
    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        yield from some_tensors([2000, 2000]).items()
        raise RuntimeError("no weights")

    sender = connected([Receiver("engine-0")])
    with pytest.raises(RuntimeError, match="no weights"):
        sender.send(exported(), verify=False, servers=[""])
    assert not segments()
    sender.close()


def test_another_system_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig.model_validate({"algorithm": "x", "model": {"path": str(tmp_path)}})
    plugin = SharedMemory(SharedMemory.Config(), run)
    found: list[tuple[str, str]] = []
    plugin.miles_check(complain=lambda key, text: found.append((key, text)))
    assert found == []
    monkeypatch.delattr(os, "memfd_create")
    plugin.miles_check(complain=lambda key, text: found.append((key, text)))
    [(key, text)] = found
    assert key == "use.transport" and "needs Linux" in text
    assert isinstance(plugin.miles_transport(), SharedMemoryTransport)


# -- across processes ------------------------------------------------------------------------------------------------

READER = """
    import sys
    from miles_core.edges.local.segments import attached
    with attached(sys.argv[1]) as memory:
        print(memory[:4].hex(), flush=True)
"""
SENDER = """
    import sys, torch
    from miles_core.edges.transport.shm import SharedMemoryTransport
    from miles_core.types import Layout
    class Slow:
        name = "engine-0"
        def ask(self, method, bucket, timeout=None):
            print(bucket.segment, flush=True)
            sys.stdin.readline()
            return {}
    sender = SharedMemoryTransport(4096, 10.0)
    sender.connect([Slow()], Layout(0, 1, 0, 1, True, True))
    sender.send(iter([("w", torch.ones(4))]), False, servers=[""])
"""


def python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_come_and_go() -> None:
    """A reader that ends leaves the memory alone, and a sender that is killed takes it along."""
    sender = python(SENDER)
    try:
        path = sender.stdout.readline().strip()
        for _ in range(2):
            out, err = python(READER, path).communicate(timeout=60)
            assert (out.strip(), err) == ("0000803f", "")  # 1.0
        os.kill(sender.pid, 9)
        sender.wait()
        with pytest.raises(TransportError, match=f"{path}: No such file or directory; its sender is gone"):
            with attached(path):
                pass
    finally:
        sender.kill()
        sender.communicate()


def test_a_sender_that_forgets_to_close_ends_quietly() -> None:
    _, err = (sender := python(SENDER)).communicate("\n", timeout=60)
    assert (sender.returncode, err) == (0, "")
