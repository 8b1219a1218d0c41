"""Weights from ranks to engines: by handles into the ranks' memory, and by broadcast in a group of real processes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
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
from transport_cases import HANDLES, LAYOUT, Engine, assert_arrived, sglang, tensors

__all__ = ["sglang"]  # a fixture

DTYPES = [torch.bfloat16, torch.float32, torch.uint8]


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


# -- transports ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["handles", "broadcast"])
def transport(request: pytest.FixtureRequest, sglang: None) -> Iterator[Any]:
    made = HandleTransport(1, 120, 20) if request.param == "handles" else BroadcastTransport(1, 120, 8)
    yield made
    made.close()


def test_every_tensor_arrives_again_and_again(transport: Any) -> None:
    engine = Engine("engine-0")
    transport.connect([engine], LAYOUT)
    for seed in range(3):
        sent = tensors(seed=seed)
        for got in engine.got:
            got.clear()
        told = transport.send(iter(sent.items()), False, [""])
        assert told == {"bytes": sum(x.nbytes for x in sent.values()), "tensors": len(sent)}
        assert_arrived(engine, sent)
    assert engine.loads > 6 if isinstance(transport, HandleTransport) else engine.loads == 3  # one is all buckets


def test_a_buffer_has_one_handle_for_all_updates(sglang: None) -> None:
    """PyTorch wraps a storage again with each handle that it makes of it."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    transport.connect([engine], LAYOUT)
    made = 0
    for seed in range(3):
        transport.send(iter(tensors(seed=seed).items()), False, [""])
        assert_arrived(engine, tensors(seed=seed))
        made = made if seed else len(HANDLES)
    assert len(HANDLES) == made > 3
    others = tensors(9, seed=3)  # another layout of the same buffers
    transport.send(iter(others.items()), False, [""])
    assert len(HANDLES) > made
    assert_arrived(engine, others)
    transport.close()


@pytest.mark.parametrize("kind", ["handles", "broadcast"])
@pytest.mark.parametrize(("every", "proved"), [(0, [0, 4]), (2, [0, 1, 3, 4, 5]), (-1, [])])
def test_what_arrives_is_proved_when_that_is_asked_for_and_now_and_then(
    sglang: None, kind: str, every: int, proved: list[int]
) -> None:
    """Before the first bucket of an update."""
    engine = Engine("engine-0")
    transport: Any = HandleTransport(1, 8192, 20, every)
    if kind == "broadcast":
        transport = BroadcastTransport(1, 8192, 20, every)
    transport.connect([engine], LAYOUT)
    for update in range(6):
        transport.send(iter(tensors().items()), update in (0, 4), [""])
    assert engine.proved == proved and engine.loads == 6
    transport.close()


def test_the_trainer_s_end_of_a_gpu_hears_whether_the_engine_keeps_its_memory(sglang: None) -> None:
    """Without a GPU, and before anything was trained, there is nothing to tell the engine of."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    transport.connect([engine], LAYOUT)
    for engine.stays in (True, False):
        transport.send(iter(tensors().items()), False, [""])
        assert HERE.stays is engine.stays and engine.rooms.pop() < 0
    transport.close()


def test_what_an_engine_refuses_names_it_and_the_tensors(transport: Any) -> None:
    engine = Engine("engine-0")
    transport.connect([engine], LAYOUT)
    engine.error = WorkerDied("engine-0 died during load")
    with pytest.raises(TransportError, match=r"engine-0 did not load layers\.0\.weight.*died during load"):
        transport.send(iter(tensors().items()), False, [""])
    engine.error = None
    transport.send(iter(tensors().items()), False, [""])
    assert_arrived(engine, tensors())


def test_the_next_bucket_is_handed_over_while_one_is_loaded(sglang: None) -> None:
    """And none is filled again before the engine has loaded it."""
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    load, arrived, taking = engine.load, threading.Semaphore(0), threading.Lock()
    slow: Any = engine

    def take(bucket: wire.Tensors) -> dict[str, int]:
        arrived.release()
        with taking:  # one after another, and none before two are there
            if not engine.loads:
                assert arrived.acquire(timeout=5) and arrived.acquire(timeout=5)
            return load(bucket)

    slow.load = take
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False, [""])
    assert engine.loads > 2
    assert_arrived(engine, tensors())
    transport.close()


def test_of_several_buckets_that_fail_the_first_is_told(sglang: None) -> None:
    engine, transport = Engine("engine-0"), HandleTransport(1, 120, 20)
    failed: Any = engine
    second = threading.Event()

    def fail(bucket: wire.Tensors) -> dict[str, int]:
        engine.loads += 1
        if engine.loads > 1:
            second.set()
            raise WorkerDied("it was given up")
        assert second.wait(5)
        raise TransportError("no such parameter")

    failed.load = fail
    transport.connect([engine], LAYOUT)
    with pytest.raises(TransportError, match=r"engine-0 did not load layers\.0\.weight.*no such parameter"):
        transport.send(iter(tensors().items()), False, [""])
    assert engine.loads == 2  # those that were under way, and no other is sent
    del failed.load
    transport.send(iter(tensors().items()), False, [""])
    assert_arrived(engine, tensors())
    transport.close()
