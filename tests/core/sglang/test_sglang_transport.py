"""Weights from ranks to engines: by handles into the ranks' memory, and by broadcast in a group of real processes."""

from __future__ import annotations

import asyncio
import base64
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.protocols import TransportError, WorkerDied
from miles_core.edges.sglang import bucket, wire
from miles_core.edges.sglang.broadcast import BroadcastTransport
from miles_core.edges.sglang.bucket import Flat, buckets
from miles_core.edges.sglang.handles import HandleTransport
from miles_core.edges.sharing import HERE
from miles_core.types import Layout

LAYOUT = Layout(rank=0, world=1, dp_rank=0, dp_size=1, last_stage=True, reports=True)
HANDLES: list[Any] = []  # what was made a handle of; whoever opens one sees what is there now
DTYPES = [torch.bfloat16, torch.float32, torch.uint8]


def tensors(n: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3 + i, 5, generator=made).to(torch.bfloat16) for i in range(n)}


# -- buckets ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(1, 4)), max_size=12), st.integers(1, 60)
)
@settings(deadline=None)
def test_buckets_hold_every_tensor_once_and_in_order(given: list[tuple[torch.dtype, int, int]], size: int) -> None:
    """Also when they were filled before, with the same tensors where they are now, or in other places."""
    named = [
        (f"t{i}", torch.arange(rows * width).view(rows, width).to(dtype))
        for i, (dtype, rows, width) in enumerate(given)
    ]
    seen: list[str] = []
    flats = Flat(size), Flat(size)
    others = [(name, tensor + 1) for name, tensor in named]
    for before in (others[::-1], others):
        for _ in buckets(iter(before), flats):
            pass
    for flat in buckets(iter(named), flats):
        assert len(flat.places) == 1 or flat.used <= size
        at = 0
        for place in flat.places:
            assert place.start == at  # a receiver puts them end to end
            at = place.end
            there = flat.tensor[place.start : place.end].view(place.dtype).view(place.shape)
            assert torch.equal(there, dict(named)[place.name])
            seen.append(place.name)
        assert at == flat.used
    assert seen == [name for name, _ in named]


def test_what_is_copied_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were gathered for a bucket must not all wait in memory until it is full."""
    monkeypatch.setattr(bucket, "BATCH", 64)
    flat, made = Flat(4096), []
    for i in range(9):
        tensor = torch.full((24,), i, dtype=torch.uint8)
        made.append(weakref.ref(tensor))
        assert flat.put(f"t{i}", tensor)
        del tensor
        assert sum(ref() is not None for ref in made) <= 2
    assert flat.tensor.tolist() == [i for i in range(9) for _ in range(24)]


# -- what both need of SGLang ------------------------------------------------------------------------------------------


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of SGLang that trainers use, with a number in place of a handle."""
    HANDLES.clear()

    class MultiprocessingSerializer:
        @staticmethod
        def serialize(obj: Any, output_str: bool) -> str:
            assert output_str
            HANDLES.append(obj)
            return base64.b64encode(b"%d" % (len(HANDLES) - 1)).decode()

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("sglang")
    module("sglang.srt")
    module(
        "sglang.srt.utils", MultiprocessingSerializer=MultiprocessingSerializer, init_custom_process_group=enter_group
    )
    module("sglang.srt.utils.patch_torch", monkey_patch_torch_reductions=lambda: None)
    module("sglang.srt.weight_sync")
    module("sglang.srt.weight_sync.tensor_bucket", FlattenedTensorMetadata=Metadata)


class Metadata:
    def __init__(self, name: str, shape: Any, dtype: Any, start_idx: int, end_idx: int, numel: int) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.start_idx, self.end_idx = start_idx, end_idx
        assert numel == end_idx - start_idx


def enter_group(
    backend: str, init_method: str, timeout: Any, world_size: int, rank: int, group_name: str
) -> torch.distributed.ProcessGroup:
    """A group apart from the default one; members may be threads of one process."""
    host, port = init_method.removeprefix("tcp://").split(":")
    assert backend == "gloo"
    store = torch.distributed.TCPStore(host, int(port), world_size, rank == 0, timeout=timeout, wait_for_workers=False)
    group: torch.distributed.ProcessGroup = torch.distributed.ProcessGroupGloo(
        torch.distributed.PrefixStore(group_name, store), rank, world_size, timeout
    )
    return group


# -- engines -----------------------------------------------------------------------------------------------------------


class Engine:
    """A worker that receives as SGLang does: whole buckets, into its own memory."""

    def __init__(self, name: str, width: int = 1) -> None:
        self.name, self.width = name, width
        self.got: list[dict[str, torch.Tensor]] = [{} for _ in range(width)]
        self.groups: dict[str, list[Any]] = {}
        self.error: Exception | None = None
        self.loads = 0
        self.stays, self.rooms = False, list[int]()
        self.server = ThreadPoolExecutor(1)  # does one thing after another, as it is told them
        self.sending = threading.Lock()

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method in ("take_turn", "end_turn"):
            return await asyncio.to_thread(getattr(self, method))
        return await asyncio.wrap_future(self.server.submit(getattr(self, method), *args))

    def take_turn(self) -> None:
        assert self.sending.acquire(timeout=20)

    def end_turn(self) -> None:
        self.sending.release()

    def leave(self, name: str) -> None:
        del self.groups[name]

    async def kill(self) -> None:
        raise NotImplementedError

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return getattr(self, method)(*args)

    def stay(self, room: int) -> bool:
        self.rooms.append(room)
        return self.stays

    def member(self, name: str) -> bool:
        return name in self.groups

    def join(self, address: str, port: int, offset: int, world: int, name: str) -> None:
        from datetime import timedelta

        made: dict[int, Any] = {}

        def enter(i: int) -> None:
            made[i] = enter_group("gloo", f"tcp://{address}:{port}", timedelta(seconds=20), world, offset + i, name)

        threads = [threading.Thread(target=enter, args=(i,)) for i in range(self.width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.groups[name] = [made[i] for i in range(self.width)]

    def load(self, bucket: wire.Tensors | wire.Broadcast) -> dict[str, int]:
        self.loads += 1
        if self.error:
            raise self.error
        if isinstance(bucket, wire.Tensors):
            for got, payload in zip(self.got, bucket.serialized, strict=True):
                told = HANDLES[int(base64.b64decode(payload))]
                for m in told["metadata"]:
                    part = told["flattened_tensor"][m.start_idx : m.end_idx]
                    got[m.name] = part.view(m.dtype).view(m.shape).clone()
            return {}
        sizes = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(bucket.shapes, bucket.dtypes, strict=True)
        ]
        if not bucket.load_format:  # one broadcast a tensor, as it is
            for groups, got in zip(self.groups[bucket.group], self.got, strict=True):
                for name, like in zip(bucket.names, sizes, strict=True):
                    got[name] = like.clone()
                    groups.broadcast(got[name], 0).wait()
            return {}
        flats = [torch.empty(sum(x.nbytes for x in sizes), dtype=torch.uint8) for _ in range(self.width)]
        works = [group.broadcast(flat, 0) for group, flat in zip(self.groups[bucket.group], flats, strict=True)]
        for work, flat, got in zip(works, flats, self.got, strict=True):
            work.wait()
            for name, like, part in zip(bucket.names, sizes, flat.split([x.nbytes for x in sizes]), strict=True):
                got[name] = part.clone().view(like.dtype).view(like.shape)
        return {}


def assert_arrived(engine: Engine, sent: dict[str, torch.Tensor]) -> None:
    for got in engine.got:
        assert got.keys() == sent.keys() and all(torch.equal(got[name], sent[name]) for name in sent)


@pytest.fixture(params=["handles", "broadcast"])
def transport(request: pytest.FixtureRequest, sglang: None) -> Iterator[Any]:
    made = HandleTransport(1, 240, 20) if request.param == "handles" else BroadcastTransport(1, 120, 8)
    yield made
    made.close()


def test_every_tensor_arrives_again_and_again(transport: Any) -> None:
    engine = Engine("engine-0")
    transport.connect([engine], LAYOUT)
    for seed in range(3):
        sent = tensors(seed=seed)
        for got in engine.got:
            got.clear()
        told = transport.send(iter(sent.items()), False)
        assert told == {"bytes": sum(x.nbytes for x in sent.values()), "tensors": len(sent)}
        assert_arrived(engine, sent)
    assert engine.loads > 6  # several buckets each


def test_a_buffer_has_one_handle_for_all_updates(sglang: None) -> None:
    """PyTorch wraps a storage again with each handle that it makes of it."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 240, 20)
    transport.connect([engine], LAYOUT)
    made = 0
    for seed in range(3):
        transport.send(iter(tensors(seed=seed).items()), False)
        assert_arrived(engine, tensors(seed=seed))
        made = made if seed else len(HANDLES)
    assert len(HANDLES) == made > 3
    others = tensors(9, seed=3)  # another layout of the same buffers
    transport.send(iter(others.items()), False)
    assert len(HANDLES) > made
    assert_arrived(engine, others)
    transport.close()


def test_the_trainer_s_end_of_a_gpu_hears_whether_the_engine_keeps_its_memory(sglang: None) -> None:
    """Without a GPU, and before anything was trained, there is nothing to tell the engine of."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    transport.connect([engine], LAYOUT)
    for engine.stays in (True, False):
        transport.send(iter(tensors().items()), False)
        assert HERE.stays is engine.stays and engine.rooms.pop() < 0
    transport.close()


def test_what_an_engine_refuses_names_it_and_the_tensors(transport: Any) -> None:
    engine = Engine("engine-0")
    transport.connect([engine], LAYOUT)
    engine.error = WorkerDied("engine-0 died during load")
    with pytest.raises(TransportError, match=r"engine-0 did not load layers\.0\.weight.*died during load"):
        transport.send(iter(tensors().items()), False)
    engine.error = None
    transport.send(iter(tensors().items()), False)
    assert_arrived(engine, tensors())


def test_the_next_bucket_is_handed_over_while_one_is_loaded(sglang: None) -> None:
    """And none is filled again before the engine has loaded it."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    load, arrived, taking = engine.load, threading.Semaphore(0), threading.Lock()
    slow: Any = engine

    def take(bucket: wire.Tensors | wire.Broadcast) -> dict[str, int]:
        arrived.release()
        with taking:  # one after another, and none before two are there
            if not engine.loads:
                assert arrived.acquire(timeout=5) and arrived.acquire(timeout=5)
            return load(bucket)

    slow.load = take
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False)
    assert engine.loads > 2
    assert_arrived(engine, tensors())
    transport.close()


def test_of_several_buckets_that_fail_the_first_is_told(sglang: None) -> None:
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    failed: Any = engine
    second = threading.Event()

    def fail(bucket: wire.Tensors | wire.Broadcast) -> dict[str, int]:
        engine.loads += 1
        if engine.loads > 1:
            second.set()
            raise WorkerDied("it was given up")
        assert second.wait(5)
        raise TransportError("no such parameter")

    failed.load = fail
    transport.connect([engine], LAYOUT)
    with pytest.raises(TransportError, match=r"engine-0 did not load layers\.0\.weight.*no such parameter"):
        transport.send(iter(tensors().items()), False)
    assert engine.loads == 4  # those that were under way, and no other is sent
    del failed.load
    transport.send(iter(tensors().items()), False)
    assert_arrived(engine, tensors())
    transport.close()


def test_a_broadcast_reaches_every_rank_of_every_engine(sglang: None) -> None:
    engines = [Engine("engine-0", 2), Engine("engine-1", 2)]
    transport = BroadcastTransport(2, 120, 20)
    transport.connect(engines, LAYOUT)
    transport.send(iter(tensors().items()), False)
    for engine in engines:
        assert_arrived(engine, tensors())
    transport.close()


def test_an_engine_that_lost_its_group_is_met_again(sglang: None) -> None:
    engines = [Engine("engine-0"), Engine("engine-1")]
    transport = BroadcastTransport(1, 120, 20)
    transport.connect(engines, LAYOUT)
    transport.send(iter(tensors().items()), False)
    engines[1].groups.clear()  # its server was replaced
    transport.send(iter(tensors(seed=1).items()), False)
    for engine in engines:
        assert_arrived(engine, tensors(seed=1))
    assert [list(engine.groups) for engine in engines] == [["miles-0-2"], ["miles-0-2"]]
    transport.close()


def test_a_rank_that_is_given_nothing_sends_nothing(sglang: None) -> None:
    engine = Engine("engine-0")
    transport = BroadcastTransport(1, 120, 20)
    transport.connect([engine], LAYOUT)
    assert transport.send(iter(()), False) == {"bytes": 0, "tensors": 0}
    assert not engine.groups and not engine.loads
    transport.close()


class Late(Engine):
    """Is told of what rank 0 does after what rank 1 does."""

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method == "join" and args[-1].startswith("miles-0-"):
            await asyncio.sleep(0.5)
        return await super().call(method, *args)


def test_two_senders_and_two_engines_do_not_wait_for_each_other(sglang: None) -> None:
    """Also where each engine is told of another rank first: an engine does one thing at a time."""
    engines = [Engine("engine-0"), Late("engine-1")]
    ranks = [BroadcastTransport(1, 120, 10), BroadcastTransport(1, 120, 10)]
    sent = [{f"{rank}.{name}": tensor for name, tensor in tensors(seed=rank).items()} for rank in range(2)]

    def send(rank: int) -> dict[str, float]:
        layout = Layout(rank=rank, world=2, dp_rank=0, dp_size=1, last_stage=rank == 1, reports=rank == 1)
        ranks[rank].connect(list(engines), layout)
        time.sleep(0.1 * rank)  # engine-0 hears of rank 0 first
        return ranks[rank].send(iter(sent[rank].items()), False)

    with ThreadPoolExecutor(2) as pool:
        told = [each.result(timeout=40) for each in [pool.submit(send, rank) for rank in range(2)]]
    assert [each["tensors"] for each in told] == [7, 7]
    for engine in engines:
        assert_arrived(engine, sent[0] | sent[1])
    for rank in ranks:
        rank.close()
