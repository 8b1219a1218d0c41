"""Weights from a trainer on one GPU to a real server on another, and what is left when one of them goes.

One GPU plays two hosts as well: NCCL goes through the network between ranks whose hosts go by different names, and so
does not mind that they have the same GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_cases import Served, apart, assert_bounded, assert_whole, group, push, serving
from gpu_cases import Trainer, run_of, trainer
from miles_core.edges.protocols import TransportError
from miles_core.edges.sglang.broadcast import BroadcastTransport
from safetensors.torch import load_file
from serving import keeping, until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

APART = 0.01
BUCKET, SMALL_BUCKET = 16 << 20, 1 << 20
SMALL = {"mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 16}
SECOND = ("--base-gpu-id", "1")  # the trainer is on the first
HOST = "NCCL_HOSTID"
ELSEWHERE = ("env", f"{HOST}=another", sys.executable, "-m", "sglang.launch_server")


@pytest.fixture(scope="module", params=["two_gpus", "two_hosts"])
def place(request: pytest.FixtureRequest) -> str:
    place: str = request.param
    if place == "two_gpus" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return place


@pytest.fixture(scope="module")
def served(place: str, tiny: Path, flags: dict[str, Any]) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "250")  # were there a watchdog, it would end this process
        words, command = (SECOND, ()) if place == "two_gpus" else ((), ELSEWHERE)
        with serving(tiny, flags | SMALL, 15, "split", words, command=command) as served:
            yield served


@pytest.fixture(scope="module")
def one(alone: None, tiny: Path) -> Iterator[Trainer]:
    with trainer(run_of(tiny, "split")) as one:
        yield one


@pytest.fixture
def transport(served: Served, one: Trainer) -> Iterator[BroadcastTransport]:
    transport = BroadcastTransport(1, BUCKET, 60, every=2)
    transport.connect([served.worker], one.model.layout)
    yield transport
    transport.close()


def assert_serves(served: Served, one: Trainer) -> None:
    requests = group(10 + served.version, 4, 32)
    completions = served.generate(requests)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART


def assert_replaced(served: Served, one: Trainer, transport: BroadcastTransport, restarts: int) -> None:
    """A server that died in an update, once it was given up; after ``restarts`` others."""
    served.ask("abort_update")
    until(lambda: served.ask("health")["restarts"] == restarts + 1, 20, "the server is replaced")
    push(served, one, transport, served.version + 1)  # waits for the successor, and meets it in another group
    assert_serves(served, one)


def test_weights_arrive_by_broadcast_and_are_proved(
    served: Served, one: Trainer, transport: BroadcastTransport
) -> None:
    push(served, one, transport, 0, verify=True)
    for _ in range(3):  # one of them is proved too
        with torch.no_grad():
            for parameter in one.model.module.parameters():
                parameter.mul_(1.01)
        push(served, one, transport, served.version + 1)
        assert_serves(served, one)


def test_every_byte_arrives_over_many_small_buckets(served: Served, one: Trainer, tiny: Path) -> None:
    """A buffer that is received into too early, or copied out of too late, would leave other weights than the disk has:
    the engine compares the checksum of each with that of version 0."""
    disk = load_file(tiny / "model.safetensors", device="cuda")
    transport = BroadcastTransport(1, SMALL_BUCKET, 60)
    transport.connect([served.worker], one.model.layout)
    assert sum(tensor.nbytes for tensor in disk.values()) > 16 * SMALL_BUCKET
    version = served.version
    for _ in range(5):
        noise = ((name, torch.randn_like(tensor)) for name, tensor in disk.items())
        for number, named in ((version + 1, noise), (0, iter(disk.items()))):
            servers = [served.ask("begin_update", number)]
            transport.send(named, verify=not number, servers=servers)
            served.ask("end_update")
    push(served, one, transport, version + 1)
    assert_serves(served, one)
    transport.close()


def test_a_send_takes_the_memory_of_its_buckets(served: Served, one: Trainer, transport: BroadcastTransport) -> None:
    assert_bounded(one, transport, BUCKET, lambda: push(served, one, transport, served.version + 1))


def test_in_place_requests_go_on_over_what_the_old_weights_computed(
    served: Served, one: Trainer, transport: BroadcastTransport
) -> None:
    """And whoever asks later reads the same prompt by the new ones."""
    push(served, one, transport, served.version + 1)
    old, requests = served.version, [r for g in range(40, 44) for r in group(g, 4, 800)]
    with keeping(served) as kept:
        started = kept.start(requests)
        until(lambda: served.ask("health")["running"] == len(requests), 30, "requests run")
        time.sleep(0.3)
        with torch.no_grad():
            for parameter in one.model.module.parameters():
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        assert not started.done()
        push(served, one, transport, old + 1)
        completions, later = started.result(120), kept.generate(requests)
    for completion in completions:
        assert completion.finish == "length" and len(completion.tokens) == len(completion.logprobs) == 800
        assert set(completion.versions) == {old, old + 1} and completion.versions == sorted(completion.versions)
    assert_whole(requests, later, old + 1)
    assert apart(one, requests, later) < APART < 2 * APART < apart(one, requests, completions, old + 1)


def test_a_server_that_dies_among_buckets_ends_the_send(
    served: Served, one: Trainer, transport: BroadcastTransport
) -> None:
    push(served, one, transport, served.version + 1)
    restarts = served.ask("health")["restarts"]

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(one.model.export()):
            if i == 20:
                served.live().process.stop()
                time.sleep(1)
            yield pair

    servers = [served.ask("begin_update", 1)]
    began = time.monotonic()
    with pytest.raises(TransportError, match="engine-0 did not load model"):
        transport.send(cut(), verify=False, servers=servers)
    assert time.monotonic() - began < 20
    assert_replaced(served, one, transport, restarts)


def test_a_server_that_dies_behind_a_send_costs_the_rank_a_moment(
    place: str, served: Served, one: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its GPU was told to receive the last bucket, and this rank's to send it, two seconds later. What is between two
    GPUs may hold all of that, and it is sent; a network does not, and NCCL says so."""
    transport = BroadcastTransport(1, BUCKET, 20)
    transport.connect([served.worker], one.model.layout)
    push(served, one, transport, served.version + 1)
    restarts = served.ask("health")["restarts"]
    tensors = sorted(one.model.export(), key=lambda named: named[1].nbytes)

    def late() -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors[:-1]
        torch.cuda._sleep(4_000_000_000)
        yield tensors[-1]

    servers = [served.ask("begin_update", served.version + 1)]
    began = time.monotonic()
    transport.send(late(), verify=False, servers=servers)
    assert time.monotonic() - began < 1
    served.live().process.stop()
    torch.cuda.synchronize()  # as the next step would
    assert 1 < time.monotonic() - began < 20
    said = list[str]()
    if place == "two_hosts":
        until(lambda: said.append(capsys.readouterr().out) or "and is given up" in "".join(said), 5, "it is given up")
    assert_replaced(served, one, transport, restarts)
    transport.close()


def test_a_server_that_dies_before_its_group_met_ends_the_send(
    served: Served, one: Trainer, transport: BroadcastTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a group meet in its first broadcast, and NCCL waits for them without a limit."""
    restarts, announce = served.ask("health")["restarts"], transport._announce

    def dying(prove: bool) -> Any:
        sending = announce(prove)
        served.live().process.stop()
        return sending

    monkeypatch.setattr(transport, "_announce", dying)
    servers = [served.ask("begin_update", served.version + 1)]
    began = time.monotonic()
    with pytest.raises(TransportError, match="engine-0 did not load model"):
        transport.send(one.model.export(), verify=False, servers=servers)
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    assert_replaced(served, one, transport, restarts)


def test_groups_come_and_go_in_the_same_memory(place: str, served: Served, one: Trainer) -> None:
    """Of the server, which takes buffers for each. What was sent last arrives, though the group is gone at once."""
    free, gpu = [], int(place == "two_gpus")
    for _ in range(8):
        transport = BroadcastTransport(1, BUCKET, 60)
        transport.connect([served.worker], one.model.layout)
        push(served, one, transport, served.version + 1)
        transport.close()
        free.append(torch.cuda.mem_get_info(gpu)[0])
    assert free[2] - free[-1] < 2 * BUCKET
    assert_serves(served, one)


def member(rank: int, place: str, folder: str, left: Any) -> None:
    """One of two ranks of a group. The first is killed; the other leaves, as a server does when it is told to."""
    if place == "two_gpus":
        torch.cuda.set_device(rank)
    else:
        os.environ[HOST] = str(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    tensor = torch.zeros(1 << 20, device="cuda")
    dist.broadcast(tensor, 0)
    torch.cuda.synchronize()
    left.put(rank)
    if rank == 0:
        signal.pause()
    time.sleep(2)
    dist.destroy_process_group()
    left.put("left")


def test_a_survivor_can_leave_a_group_of_the_dead(place: str, tmp_path: Path) -> None:
    """Or a server that is told to would stand still; see ``BroadcastTransport._dismiss``."""
    fresh = get_context("spawn")
    left = fresh.Queue()
    both = [fresh.Process(target=member, args=(rank, place, str(tmp_path), left)) for rank in range(2)]
    for process in both:
        process.start()
    assert {left.get(timeout=120), left.get(timeout=120)} == {0, 1}
    both[0].kill()
    try:
        assert left.get(timeout=30) == "left"
    finally:
        for process in both:
            process.kill()
