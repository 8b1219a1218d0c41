"""Weights from ranks to engines: by handles into the ranks' memory, and by broadcast in a group of real processes."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.protocols import TransportError, WorkerDied
from miles_core.edges.sglang import broadcast, bucket, wire
from miles_core.edges.sglang.broadcast import BroadcastTransport, Sent
from miles_core.edges.sglang.bucket import Flat, Place, buckets
from miles_core.edges.sglang.handles import HandleTransport
from miles_core.edges.sharing import HERE
from miles_core.types import Layout
from serving import until
from transport_cases import HANDLES, LAYOUT, Engine, Late, assert_arrived, sglang, tensors

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


def test_a_broadcast_reaches_every_rank_of_every_engine(sglang: None) -> None:
    engines = [Engine("engine-0", 2), Engine("engine-1", 2)]
    transport = BroadcastTransport(2, 120, 20)
    transport.connect(engines, LAYOUT)
    transport.send(iter(tensors().items()), False, ["a", "b"])
    for engine in engines:
        assert_arrived(engine, tensors())
    transport.close()


def test_an_engine_that_lost_its_group_is_met_again(sglang: None) -> None:
    engines = [Engine("engine-0"), Engine("engine-1")]
    transport = BroadcastTransport(1, 120, 20)
    transport.connect(engines, LAYOUT)
    transport.send(iter(tensors().items()), False, ["a", "b"])
    [first] = engines[0].groups
    engines[1].groups.clear()  # its server was replaced
    transport.send(iter(tensors(seed=1).items()), False, ["a", "c"])
    for engine in engines:
        assert_arrived(engine, tensors(seed=1))
    assert list(engines[0].groups) == list(engines[1].groups) != [first] and len(engines[0].groups) == 1
    transport.close()


@dataclass
class Work:
    """Of a broadcast on a GPU: ``synchronize`` has the GPU wait for it, and ``wait`` whoever calls it."""

    began: float
    takes_s: float
    error: Exception | None = None
    waited: bool = False

    def is_completed(self) -> bool:
        return time.monotonic() - self.began > self.takes_s

    def synchronize(self) -> None:
        self.waited = True

    def wait(self) -> None:
        time.sleep(max(0.0, self.began + self.takes_s - time.monotonic()))
        if self.error:
            raise self.error


def settle(transport: BroadcastTransport, takes_s: float, error: Exception | None = None) -> tuple[float, Work, Sent]:
    """End a send whose last bucket is said to be on its way on a GPU, whose streams keep the order; from when on."""
    work = Work(time.monotonic(), takes_s, error)
    last = Sent([Place("last", torch.uint8, torch.Size([1]), 0, 1)], torch.zeros(1), work, on_gpu=True)
    transport._settle(deque([last]), turn=False)
    return work.began, work, last


@pytest.mark.parametrize("arrives", [True, False])
def test_a_broadcast_that_nobody_waits_for_is_given_up_once_it_hangs(
    arrives: bool, sglang: None, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, transport = Engine("engine-0"), BroadcastTransport(1, 120, 5.0)
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False, [""])
    [first] = engine.groups
    began, work, last = settle(transport, 0.5 if arrives else math.inf)
    assert time.monotonic() - began < 0.3 and work.waited and last.tensor is None
    transport.send(iter(tensors(seed=1).items()), False, [""])
    assert_arrived(engine, tensors(seed=1))
    assert time.monotonic() - began > (0.5 if arrives else 4.0)
    assert (list(engine.groups) == [first]) is arrives
    assert ("last: their broadcast hangs, and is given up" in capsys.readouterr().out) is not arrives
    transport.close()


@pytest.mark.parametrize("sends", [True, False])
def test_a_broadcast_that_nobody_waits_for_is_given_up_once_it_failed(
    sends: bool, sglang: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a network in between, NCCL knows that the other end is gone."""
    engine, transport = Engine("engine-0"), BroadcastTransport(1, 120, 60)
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False, [""])
    [first] = engine.groups
    began, _, _ = settle(transport, 0.2, RuntimeError("remote process exited"))
    if not sends:
        until(lambda: transport._group is None, 1, "the group is given up")
    transport.send(iter(tensors(seed=1).items()), False, [""])
    assert_arrived(engine, tensors(seed=1))
    assert 0.2 < time.monotonic() - began < 2 and first not in engine.groups
    said = capsys.readouterr().out
    assert said.count("last: their broadcast failed (remote process exited), and is given up") == 1
    transport.close()


@pytest.mark.parametrize("closes", [True, False])
def test_what_hangs_behind_a_send_is_given_up_long_before_a_load_would_be(
    closes: bool, sglang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then every engine has answered, and one is gone if it hangs. Who closes does not wait even so long, and has
    those that are left leave."""
    monkeypatch.setattr(broadcast, "LEAVE_S" if closes else "TAIL_S", 0.3)
    engine, transport = Engine("engine-0"), BroadcastTransport(1, 120, 600)
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False, [""])
    [first] = engine.groups
    began, _, _ = settle(transport, math.inf)
    if not closes:
        transport.send(iter(tensors(seed=1).items()), False, [""])
        assert first not in engine.groups
    transport.close()
    assert 0.3 < time.monotonic() - began < 5 and not engine.groups
    transport.close()


class Meeting:
    """A group whose first broadcast is where its ranks meet, as NCCL's is."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.there = error, threading.Event()
        self.real: Any = None  # the one that the engine entered, which it would hear of if it were gone

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        if self.error:
            raise self.error
        self.there.wait()


REFUSED = RuntimeError("remote process exited")


@pytest.mark.parametrize(
    ("dies", "error", "said", "limit_s"),
    [
        (True, None, r"engine-0 did not load layers\.0\.weight.*died during load", 1),
        (True, REFUSED, r"engine-0 did not load layers\.0\.weight.*died during load", 1),
        (False, REFUSED, r"layers\.0\.weight.* were not sent: remote process exited", 1),
        (False, None, r"layers\.0\.weight.*: their broadcast hangs", 3),
    ],
)
def test_a_group_that_never_meets_ends_the_send(
    dies: bool, error: Exception | None, said: str, limit_s: float, sglang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits for ranks that are gone without a limit, or says so in words of its own."""
    monkeypatch.setattr(broadcast, "LEAVE_S", 0.3)
    engine, transport = Engine("engine-0"), BroadcastTransport(1, 120, 2)
    transport.connect([engine], LAYOUT)
    meeting, enter = Meeting(error), broadcast._enter

    def meet(*args: Any) -> Meeting:
        meeting.real = enter(*args)
        return meeting

    engine.error = WorkerDied("engine-0 died during load") if dies else None
    began = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(TransportError, match=said):
        patch.setattr(broadcast, "_enter", meet)
        transport.send(iter(tensors().items()), False, [""])
    assert time.monotonic() - began < limit_s
    meeting.there.set()
    meeting.real = engine.error = None
    transport.send(iter(tensors().items()), False, [""])
    assert_arrived(engine, tensors())
    transport.close()


def test_a_rank_that_is_given_nothing_sends_nothing(sglang: None) -> None:
    engine = Engine("engine-0")
    transport = BroadcastTransport(1, 120, 20)
    transport.connect([engine], LAYOUT)
    assert transport.send(iter(()), False, [""]) == {"bytes": 0, "tensors": 0}
    assert not engine.groups and not engine.loads
    transport.close()


def test_two_senders_and_two_engines_do_not_wait_for_each_other(sglang: None) -> None:
    """Also where each engine is told of another rank first: an engine does one thing at a time."""
    engines = [Engine("engine-0"), Late("engine-1")]
    ranks = [BroadcastTransport(1, 120, 10), BroadcastTransport(1, 120, 10)]
    sent = [{f"{rank}.{name}": tensor for name, tensor in tensors(seed=rank).items()} for rank in range(2)]

    def send(rank: int) -> dict[str, float]:
        layout = Layout(rank=rank, world=2, dp_rank=0, dp_size=1, last_stage=rank == 1, reports=rank == 1)
        ranks[rank].connect(list(engines), layout)
        time.sleep(0.1 * rank)  # engine-0 hears of rank 0 first
        return ranks[rank].send(iter(sent[rank].items()), False, ["a", "b"])

    with ThreadPoolExecutor(2) as pool:
        told = [each.result(timeout=40) for each in [pool.submit(send, rank) for rank in range(2)]]
    assert [each["tensors"] for each in told] == [7, 7]
    for engine in engines:
        assert_arrived(engine, sent[0] | sent[1])
    for rank in ranks:
        rank.close()
