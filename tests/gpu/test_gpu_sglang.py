"""The SGLang edge with a real server beside a real trainer on one GPU: tokens, weights by CUDA IPC, faults.

The server is one for all tests but those at the end, which kill it, stop it, and cut an update of its weights short.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Served, apart, assert_bounded, assert_whole, group, push, serving
from gpu_cases import SHAPE, Trainer, free, pack, run_of, sequences, trainer
from miles_core.edges.protocols import EngineError, TransportError
from miles_core.edges.sglang.handles import HandleTransport
from miles_core.edges.sharing import HERE
from serving import until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

APART = 0.01  # most mean difference between the log-probabilities of trainer and engine, both in bfloat16
HANG_S = 15.0
BUCKET = 16 << 20  # bytes: the model takes several, and its embedding is larger than one
SMALL = {"mem_fraction_static": 0.2, "cuda_graph_max_bs_decode": 16}  # to start sooner


@pytest.fixture(scope="module")
def served(tiny: Path, flags: dict[str, Any]) -> Iterator[Served]:
    with serving(tiny, flags | SMALL, HANG_S) as served:
        yield served


@pytest.fixture(scope="module")
def one(alone: None, tiny: Path) -> Iterator[Trainer]:
    with trainer(run_of(tiny, "colocate", optim={"lr": 5e-4, "max_norm": 0.0})) as one:
        yield one


@pytest.fixture(scope="module")
def transport(served: Served, one: Trainer) -> Iterator[HandleTransport]:
    transport = HandleTransport(1, BUCKET, 120)
    transport.connect([served.worker], one.model.layout)
    yield transport
    transport.close()


def running(served: Served) -> bool:
    return bool(served.ask("health")["running"])


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_come_with_the_trainers_log_probabilities(served: Served, one: Trainer) -> None:
    for temperature in (1.0, 0.7):
        requests = [r for g in range(16) for r in group(g, 4, 32, temperature=temperature)]
        completions = served.generate(requests)
        assert_whole(requests, completions, served.version)
        assert len({tuple(completion.tokens) for completion in completions}) == 64  # drawn, not repeated
        assert apart(one, requests, completions) < APART


def test_a_stop_token_ends_a_response(served: Served) -> None:
    [greedy] = served.generate(group(20, 1, 8, temperature=0.0))
    stop = greedy.tokens[3]
    [completion] = served.generate(group(20, 1, 8, temperature=0.0, stop_tokens=(stop,)))
    assert completion.finish == "stop" and completion.tokens == greedy.tokens[: greedy.tokens.index(stop) + 1]


def test_aborted_requests_keep_their_tokens_and_the_others_go_on(served: Served) -> None:
    tokens = 3000
    started = served.start(group(30, 3, tokens))
    until(lambda: running(served), 30, "requests run")
    time.sleep(0.5)
    served.ask("abort", ["30/1"])
    time.sleep(0.5)
    assert running(served) and not started.done()
    served.ask("abort", None)
    completions = started.result(30)
    assert [completion.finish for completion in completions] == ["abort"] * 3
    sizes = [len(completion.tokens) for completion in completions]
    assert 0 < sizes[1] < min(sizes[0], sizes[2]) and max(sizes) < tokens
    assert all(len(c.logprobs) == len(c.versions) == len(c.tokens) for c in completions)


def test_a_paused_server_writes_nothing_and_then_goes_on(served: Served, one: Trainer) -> None:
    requests = group(40, 4, 400)
    began = time.monotonic()
    served.generate(requests)
    took = time.monotonic() - began
    started = served.start(requests)
    until(lambda: running(served), 30, "requests run")
    served.ask("pause")
    time.sleep(2 * took + 1)
    assert not started.done()
    served.ask("resume")
    completions = started.result(60)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART


def test_memory_is_given_back_and_taken_again(served: Served, one: Trainer) -> None:
    before = free()
    served.ask("release", ["kv_cache"])
    without = free()
    assert without - before > 1 << 30
    served.ask("restore", ["kv_cache"])
    assert abs(free() - before) < 512 << 20
    requests = group(50, 4, 32)
    completions = served.generate(requests)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_arrive_by_handles_and_every_tensor_is_compared(
    served: Served, one: Trainer, transport: HandleTransport
) -> None:
    told = push(served, one, transport, 0, verify=True)
    sizes = {name: tensor.nbytes for name, tensor in one.export().items()}
    assert told == {"bytes": float(sum(sizes.values())), "tensors": float(len(sizes))}
    before = served.ask("checksums")
    spoiled = "model.layers.1.mlp.down_proj.weight"
    servers = [served.ask("begin_update", 0)]
    transport.send(
        ((name, t + 1 if name == spoiled else t) for name, t in one.model.export()), verify=True, servers=servers
    )
    with pytest.raises(TransportError, match=f"1 of {len(before)} tensors are not what .* such as 0/{spoiled}"):
        served.ask("end_update")
    transport.send(one.model.export(), verify=True, servers=servers)
    served.ask("end_update")
    assert served.ask("checksums") == before
    requests = group(60, 4, 32)
    completions = served.generate(requests)
    assert_whole(requests, completions, 0)
    assert apart(one, requests, completions) < APART


def test_a_tensor_that_never_arrives_is_found_out(served: Served, one: Trainer, transport: HandleTransport) -> None:
    """The server has it from its disk, and it is made random."""
    lost = "model.layers.2.mlp.down_proj.weight"
    for version, why in ((0, "are not what the server read"), (5, "of the engine did not arrive")):
        servers = [served.ask("begin_update", version)]
        transport.send(
            ((name, tensor) for name, tensor in one.model.export() if name != lost), verify=True, servers=servers
        )
        with pytest.raises(TransportError, match=f"1 of .* tensors {why}.* such as 0/{lost}"):
            served.ask("end_update")
        transport.send(one.model.export(), verify=True, servers=servers)
        served.ask("end_update")
    served.version = version


def test_a_send_takes_the_memory_of_its_buckets(served: Served, one: Trainer) -> None:
    transport = HandleTransport(1, BUCKET, 120)
    transport.connect([served.worker], one.model.layout)
    assert_bounded(one, transport, BUCKET, lambda: push(served, one, transport, served.version + 1))
    transport.close()


def test_a_step_changes_what_is_sampled(served: Served, one: Trainer, transport: HandleTransport) -> None:
    requests = [r for g in range(70, 78) for r in group(g, 4, 64)]
    old = served.generate(requests)
    before = served.ask("checksums")
    one.learn([pack(sequences((400, 300), SHAPE["vocab_size"]))])
    one.model.step(lambda norm: None)
    push(served, one, transport, served.version + 1)
    after = served.ask("checksums")
    assert after.keys() == before.keys()
    # A norm's weight is 1 at first, and the learning rate is less than what bfloat16 can add to that.
    assert not [name for name in before if before[name] == after[name] and "norm" not in name]
    new = served.generate(requests)
    assert_whole(requests, new, served.version)
    assert apart(one, requests, new) < APART < 5 * APART < apart(one, requests, old)


def test_requests_in_flight_go_on_under_new_weights(served: Served, one: Trainer, transport: HandleTransport) -> None:
    """Each token is of the version that it is said to be of, and has that version's log-probability."""
    old = served.version
    parameters = list(one.model.module.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    one.learn([pack(sequences((400, 300), SHAPE["vocab_size"]))])
    one.model.step(lambda norm: None)
    after = [parameter.detach().clone() for parameter in parameters]
    requests = [r for g in range(90, 94) for r in group(g, 4, 800)]
    started = served.start(requests)
    until(lambda: running(served), 30, "requests run")
    time.sleep(0.3)
    assert not started.done()
    push(served, one, transport, old + 1)
    completions = started.result(120)
    for completion in completions:
        assert completion.finish == "length" and len(completion.tokens) == len(completion.logprobs) == 800
        assert set(completion.versions) == {old, old + 1} and completion.versions == sorted(completion.versions)
    assert apart(one, requests, completions, old + 1) < APART < 5 * APART < apart(one, requests, completions, old)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        assert apart(one, requests, completions, old) < APART
        for parameter, value in zip(parameters, after, strict=True):
            parameter.copy_(value)


def never_stays(served: Served, one: Trainer, transport: HandleTransport) -> None:
    """From the next training on, the engine gives its memory up."""
    HERE.trained = False
    push(served, one, transport, served.version + 1)
    assert not HERE.stays


def test_both_keep_their_memory_where_they_fit(served: Served, one: Trainer, transport: HandleTransport) -> None:
    never_stays(served, one, transport)
    torch.cuda.reset_peak_memory_stats()  # what other tests of this process took is not this training's
    left, requests = [], group(80, 4, 32)
    for _ in range(2):  # what is known of the first training decides on the second
        served.ask("begin_update", 1)
        left.append(free())
        one.learn([pack(sequences((400, 300), SHAPE["vocab_size"]))])
        one.model.step(lambda norm: None)
        push(served, one, transport, served.version + 1)
        assert HERE.stays
    assert left[0] - left[1] > 1 << 30
    completions = served.generate(requests)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART
    never_stays(served, one, transport)


# -- faults ----------------------------------------------------------------------------------------------------------


def parents(leader: int) -> dict[int, int]:
    """Living processes of a process group, each with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, of = path.read_text().rpartition(")")[2].split()[:3]
            if int(of) == leader and state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def leader_of(served: Served) -> int:
    return served.live().process._process.pid


def assert_retried(served: Served, one: Trainer, transport: HandleTransport, harm: Any, patience_s: float) -> None:
    """Requests in flight, when ``harm`` befalls the server, are answered by its successor once weights are there."""
    leader, restarts = leader_of(served), served.ask("health")["restarts"]
    requests = [r for g in range(80, 84) for r in group(g, 4, 800)]
    started = served.start(requests)
    until(lambda: running(served), 30, "requests run")
    time.sleep(0.3)
    assert not started.done()
    harm(leader)
    until(lambda: served.ask("health")["restarts"] == restarts + 1, patience_s, "the server is replaced")
    until(lambda: not parents(leader), 15, "nothing of the old server is left")
    assert served.ask("health")["stale"] and not started.done()
    push(served, one, transport, served.version)  # waits for the successor
    completions = started.result(120)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART
    assert served.ask("health")["restarts"] == restarts + 1 and not running(served)


def server_of(leader: int) -> int:
    """The server itself, neither its guards nor what it started."""
    mine = [pid for pid, parent in parents(leader).items() if parent == leader]
    [server] = [pid for pid in mine if b"guard.py" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return server


def kill(leader: int) -> None:
    """The server alone: its guards must see to the rest."""
    os.kill(server_of(leader), signal.SIGKILL)


def hang(leader: int) -> None:
    """What the server started, its scheduler among it. The web server still answers."""
    server = server_of(leader)
    children = [pid for pid, parent in parents(leader).items() if parent == server]
    assert children
    for pid in children:
        os.kill(pid, signal.SIGSTOP)


def test_a_killed_server_loses_no_request(served: Served, one: Trainer, transport: HandleTransport) -> None:
    if not served.version:  # of version 0 a successor serves what it finds on the disk
        push(served, one, transport, 1)
    assert_retried(served, one, transport, kill, 10)


def test_a_server_that_hangs_is_found_out_and_replaced(
    served: Served, one: Trainer, transport: HandleTransport
) -> None:
    assert_retried(served, one, transport, hang, 10 + 2 * HANG_S)


def test_an_update_cut_short_is_never_served(served: Served, one: Trainer, transport: HandleTransport) -> None:
    leader = leader_of(served)
    servers = [served.ask("begin_update", 1)]

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(one.model.export()):
            if i == 20:
                raise ConnectionError("the rank is gone")
            yield pair

    with pytest.raises(ConnectionError, match="the rank is gone"):
        transport.send(cut(), verify=False, servers=servers)
    assert served.worker.engine._update.loads, "some weights had been overwritten"
    served.ask("abort_update")
    with pytest.raises(EngineError, match="was cut short; its successor serves nothing until whole weights arrive"):
        served.ask("address")
    until(lambda: not parents(leader), 15, "nothing of the old server is left")
    push(served, one, transport, served.version + 1)  # waits for the successor
    requests = group(85, 4, 32)
    completions = served.generate(requests)
    assert_whole(requests, completions, served.version)
    assert apart(one, requests, completions) < APART
