"""What Miles has SGLang call: it runs in a server's process, in a group that was made as SGLang makes one."""

from __future__ import annotations

import gc
import json
import pickle
import pickletools
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from miles_core.edges.protocols import TransportError
from miles_core.edges.sglang import receive, wire
from miles_core.edges.sglang.broadcast import BroadcastTransport
from miles_core.edges.sglang.bucket import Lone
from miles_core.edges.sglang.process import free_port
from miles_core.edges.sglang.receive import Sending, note, places_of
from miles_core.types import Layout
from run_server import digest, enter_group
from serving import Served, serving, until
from sglang_cases import told
from transport_cases import sglang, tensors

__all__ = ["sglang"]  # a fixture

RUN_SERVER = str(Path(__file__).with_name("run_server.py"))
BUCKET = 160  # bytes: two or three of the tensors
LIMIT = timedelta(seconds=30)  # a store asks for names of addresses, which may take 5 s where one is lost
RANKS = count()  # a process has no two groups of one name


@pytest.fixture
def served(sglang: None, monkeypatch: pytest.MonkeyPatch, dialect: str) -> Iterator[Served]:
    monkeypatch.setattr(sys.modules["sglang.srt.utils"], "init_custom_process_group", enter_group)
    words = ("--model-path", "some", "--custom-weight-loader", wire.RECEIVE)
    command = (sys.executable, RUN_SERVER, dialect)
    with serving((words, 30.0, 15.0, "gloo"), command=command, host="127.0.0.1") as served:
        yield served


@pytest.fixture
def transport(served: Served) -> Iterator[BroadcastTransport]:
    made = BroadcastTransport(1, BUCKET, 15)
    made.connect(
        [served.worker], Layout(rank=next(RANKS), world=1, dp_rank=0, dp_size=1, last_stage=True, reports=True)
    )
    yield made
    made.close()


def mixed(seed: int) -> dict[str, torch.Tensor]:
    """Of several kinds, two of them larger than a bucket, one of them the last."""
    made = tensors(seed=seed)
    made |= {"large": torch.arange(60.0) + seed, "one": torch.tensor(0.5 + seed), "none": torch.zeros(0, 3)}
    return made | {f"b{n}": torch.full((n,), seed, dtype=torch.uint8) for n in (3, 5, 159)} | {"end": made["large"] + 1}


def push(served: Served, transport: BroadcastTransport, sent: dict[str, torch.Tensor], version: int) -> None:
    servers = [served.ask("begin_update", version)]
    transport.send(iter(sent.items()), verify=False, servers=servers)
    served.ask("end_update")


def received(served: Served) -> dict[str, str]:
    digests: dict[str, str] = told(served.live().url + "/received")
    return digests


def test_every_tensor_comes_to_the_server_over_many_buckets_again_and_again(
    served: Served, transport: BroadcastTransport
) -> None:
    for version in (1, 2, 3):
        sent = mixed(version)
        push(served, transport, sent, version)
        assert received(served) == {name: digest(tensor) for name, tensor in sent.items()}
    paths = [path for path in told(served.live().url + "/calls") if path.startswith("/update_weights")]
    assert paths == ["/update_weights_from_tensor"] * 3
    assert served.ask("health")["version"] == 3 and not served.ask("health")["restarts"]


def test_what_is_wrong_in_the_loader_is_told_and_the_server_replaced(
    served: Served, transport: BroadcastTransport
) -> None:
    """It ends the scheduler; what it said last is behind the complaint."""
    strange = {**tensors(), "strange.weight": torch.zeros(3)}
    servers = [served.ask("begin_update", 1)]
    told = r"engine-0 did not load (?s:.)*weights were not loaded, at bucket \d+, .*: KeyError: 'strange\.weight'"
    with pytest.raises(TransportError, match=told):
        transport.send(iter(strange.items()), verify=False, servers=servers)
    served.ask("abort_update")
    push(served, transport, tensors(), 1)  # waits for the successor, and meets it in another group
    assert received(served) == {name: digest(tensor) for name, tensor in tensors().items()}
    assert served.ask("health")["restarts"] == 1


def test_who_sends_outside_an_update_has_the_server_replaced(served: Served, transport: BroadcastTransport) -> None:
    """It may have received the first bucket by then, and would wait for the second for ever."""
    push(served, transport, tensors(), 1)
    server = served.live().address
    with pytest.raises(TransportError, match="engine-0 did not load layers(?s:.)*weights arrived outside an update"):
        transport.send(iter(tensors(seed=1).items()), verify=False, servers=[server])
    assert served.ask("health")["restarts"] == 1
    push(served, transport, tensors(seed=2), 2)
    assert received(served) == {name: digest(tensor) for name, tensor in tensors(seed=2).items()}


# -- in this process ---------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, keeps: bool = False, stops: bool = False) -> None:
        super().__init__()
        self.keeps, self.stops, self.names = keeps, stops, list[str]()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, _ in list(weights) if self.keeps else weights:
            self.names.append(name)
            if self.stops:
                return


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)


@pytest.fixture
def sending(store: dist.TCPStore) -> Iterator[Sending]:
    """Four buckets, in a group of one."""
    name = f"miles-{next(RANKS)}-alone"
    enter_group("gloo", f"tcp://127.0.0.1:{free_port('127.0.0.1')}", 1, 0, name)
    sending = Sending(name, "127.0.0.1", store.port, 1, 64, LIMIT.total_seconds())
    write(store, sending)
    yield sending
    leave(name)


def write(store: dist.TCPStore, sending: Sending) -> None:
    for i in range(4):
        store.set(sending.key(i), note(Lone(f"t{i}", torch.zeros(10)).places))
    store.set(sending.key(4), note([]))


def leave(name: str) -> None:
    """As the server does when it is told to."""
    for group in [group for group, called in dist.distributed_c10d._world.pg_names.items() if called == name]:
        dist.destroy_process_group(group)


def opened(sending: Sending) -> list[tuple[str, torch.Tensor]]:
    """What SGLang makes of it."""
    named: list[tuple[str, torch.Tensor]] = pickle.loads(b64decode(sending.payload(), validate=True))
    return named


def test_what_goes_with_the_request_is_all_in_it(sending: Sending) -> None:
    """So that it may come from another machine: neither a file nor shared memory, and no name but one that every
    SGLang opens."""
    words = [word for _, word, _ in pickletools.genops(b64decode(sending.payload())) if isinstance(word, str)]
    assert words[1:] == ["torch", "Tensor"]
    [(told, empty)] = opened(sending)
    assert Sending(**json.loads(told)) == sending and empty.numel() == 0
    places = [*Lone("a", torch.zeros(2, 3, dtype=torch.bfloat16)).places]
    assert places_of(note(places).encode()) == places and places_of(note([]).encode()) == []


@pytest.mark.parametrize("fails", [True, False])
def test_buffers_are_gone_with_the_group(fails: bool, sending: Sending, store: dist.TCPStore) -> None:
    """Also where its thread failed after the last update."""
    model = Model()
    receive.receive(model, opened(sending))
    assert model.names == [f"t{i}" for i in range(4)]
    [left] = receive._receivers.values()
    assert left.at == "at bucket 3, t3"
    if fails:
        store.set(replace(sending, number=2).key(0), "no note")
        until(left._arrived.qsize, 10, "what is wrong is there for the next call")
    del left
    leave(sending.group)
    # Its thread may be at the end of the update yet.
    until(lambda: not gc.collect() and not receive._receivers, 10, "the receiver is gone")


def test_a_group_that_was_left_is_named(sending: Sending) -> None:
    left = Sending("elsewhere", sending.host, sending.port, 1, 64, 5.0)
    with pytest.raises(RuntimeError, match="weights were sent in group elsewhere, which this server is not in"):
        receive.receive(Model(), opened(left))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Model(keeps=True), "at bucket 1, t1, .* the model keeps t0 while it asks for tensors behind it"),
        (Model(stops=True), "at bucket 1, t1, .* the model asks for no more tensors, and there are more"),
    ],
)
def test_a_model_that_does_not_go_through_the_tensors_once_is_refused(sending: Sending, model: Any, why: str) -> None:
    """Or it would load what was overwritten by then, or a part."""
    with pytest.raises(RuntimeError, match=why):
        receive.receive(model, opened(sending))


def test_a_sender_that_is_gone_is_waited_for_no_longer_than_the_limit(sending: Sending) -> None:
    late = Sending(sending.group, sending.host, sending.port, 2, 64, 0.2)
    with pytest.raises(
        RuntimeError, match=r"before the first bucket, in group miles-.*the next bucket was not sent within 0\.2 s"
    ):
        receive.receive(Model(), opened(late))


def test_two_buckets_are_received_ahead_of_the_call(sending: Sending, store: dist.TCPStore) -> None:
    receive.receive(Model(), opened(sending))
    later, model = replace(sending, number=2), Model()
    write(store, later)
    receiver = receive.receiver_of(receive._joined(sending.group), later, torch.device("cpu"))
    until(lambda: receiver._arrived.qsize() == receive.SLOTS == 2, 10, "two buckets are there")
    time.sleep(0.2)
    assert receiver._arrived.qsize() == 2  # and no third one, for which there is no buffer
    receive.receive(model, opened(later))
    assert model.names == [f"t{i}" for i in range(4)]


def test_an_update_that_is_not_the_one_sent_is_not_loaded(sending: Sending) -> None:
    model = Model()
    receiver = receive.receiver_of(receive._joined(sending.group), sending, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="it is of update 1, and update 2 was to be loaded"):
        receiver.load(model, replace(sending, number=2))
    assert not model.names


def test_a_rank_that_leaves_the_group_ends_a_load_and_the_thread(sending: Sending, store: dist.TCPStore) -> None:
    late, before = replace(sending, number=2), set(threading.enumerate())
    receive.receive(Model(), opened(sending))
    [thread] = set(threading.enumerate()) - before
    store.set(late.key(0), receive.OVER)
    with pytest.raises(RuntimeError, match="before the first bucket, in group miles-.*its rank left the group"):
        receive.receive(Model(), opened(late))
    until(lambda: not thread.is_alive(), 10, "the thread is gone")
