"""Broadcasts from ranks to engines, in groups whose members are threads: how they are met, given up and left."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from miles_core.edges.protocols import TransportError, WorkerDied
from miles_core.edges.sglang import broadcast
from miles_core.edges.sglang.broadcast import UNWATCHED, BroadcastTransport, Sent
from miles_core.edges.sglang.bucket import Place
from miles_core.types import Layout
from serving import until
from transport_cases import LAYOUT, Engine, Late, assert_arrived, enter_group, sglang, tensors

__all__ = ["sglang"]  # a fixture


def met(timeout_s: float) -> tuple[Engine, BroadcastTransport, str]:
    """An engine, a rank that has sent to it once, and the name of the group in which they met for that."""
    engine, transport = Engine("engine-0"), BroadcastTransport(1, 120, timeout_s)
    transport.connect([engine], LAYOUT)
    transport.send(iter(tensors().items()), False, [""])
    [group] = engine.groups
    return engine, transport, group


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
    """Of a broadcast on a GPU: the GPU's stream can wait for it, or whoever calls ``wait``."""

    began: float
    takes_s: float
    error: Exception | None = None
    waited: bool = False

    def is_completed(self) -> bool:
        return time.monotonic() - self.began > self.takes_s

    def block_current_stream(self) -> None:
        self.waited = True

    def wait(self) -> None:
        time.sleep(max(0.0, self.began + self.takes_s - time.monotonic()))
        if self.error:
            time.sleep(0.1)  # for another thread to be there too
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
    engine, transport, first = met(5.0)
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
    engine, transport, first = met(60)
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
    engine, transport, first = met(600)
    began, _, _ = settle(transport, math.inf)
    if not closes:
        transport.send(iter(tensors(seed=1).items()), False, [""])
        assert first not in engine.groups
    transport.close()
    assert 0.3 < time.monotonic() - began < 5 and not engine.groups
    transport.close()


def test_who_closes_has_engines_leave_first(sglang: None) -> None:
    """A network may still have the end of the last update to send."""
    (engine, transport, _), left = met(20), list[bool]()
    transport._group = SimpleNamespace(abort=lambda: left.append(not engine.groups))
    transport.close()
    assert left == [True]


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
    assert time.monotonic() - began < limit_s and not engine.killed
    meeting.there.set()
    meeting.real = engine.error = None
    transport.send(iter(tensors().items()), False, [""])
    assert_arrived(engine, tensors())
    transport.close()


@pytest.mark.parametrize("before", [None, "0"])
def test_groups_have_no_watchdog(before: str | None, sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever wishes that others have none keeps what was said of those."""
    monkeypatch.delenv(UNWATCHED, raising=False)
    if before:
        monkeypatch.setenv(UNWATCHED, before)
    seen = list[str]()

    def enter(*args: Any, **kwargs: Any) -> Any:
        seen.append(os.environ[UNWATCHED])
        return enter_group(*args, **kwargs)

    monkeypatch.setattr(sys.modules["sglang.srt.utils"], "init_custom_process_group", enter)
    _, transport, _ = met(20)
    assert seen == ["1"] and os.environ.get(UNWATCHED) == before
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
