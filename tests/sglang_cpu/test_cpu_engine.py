"""The SGLang edge against the stock 0.5.23 server: tokens, what stops them, and weights by broadcast."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import BUCKET, CLOSE, Weights, apart, assert_right, group
from miles_core.edges.protocols import Completion, EngineError, TransportError
from miles_core.edges.sglang import wire
from miles_core.edges.sglang.broadcast import BroadcastTransport
from miles_core.edges.sglang.calls import Declined
from miles_core.edges.sglang.process import states
from miles_core.edges.sglang.receive import Sending
from miles_core.types import Layout
from serving import START_S, Served, keeping, until
from together.whole_runs import processes_of

pytestmark = [pytest.mark.sglang_cpu, pytest.mark.timeout(2 * START_S)]

LONG = 300  # tokens: some seconds
FAR = 1.0  # log-probabilities of two versions are further apart than this somewhere


def push(served: Served, transport: BroadcastTransport, weights: Weights, version: int) -> dict[str, float]:
    servers = [served.ask("begin_update", version)]
    told = transport.send(weights.tensors(version), verify=version == 0, servers=servers)
    served.ask("end_update")
    served.version = version
    return told


def writing(served: Served, n: int) -> None:
    """Wait until ``n`` requests have some tokens."""
    until(lambda: served.ask("health")["running"] == n, 60, "requests run")
    time.sleep(0.5)


def living(group: int) -> list[str]:
    """Processes of a group; those that are only waiting for somebody to note their end do not count."""
    return [state for state in states(group) if state != "Z"]


def leader_of(served: Served) -> int:
    return served.live().process._process.pid


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_it_is_the_release_that_was_asked_for(served: Served) -> None:
    live = served.live()
    assert live.release == "0.5.23" and live.sessions
    state = served.ask("health")
    assert state == {
        "version": 0, "running": 0, "waiting": 0, "restarts": 0, "release": "0.5.23", "refuses": "", "stale": False,
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_that_transformers_computes(
    served: Served, weights: Weights, temperature: float
) -> None:
    requests = [r for g in range(4) for r in group(g, 4, 24, temperature=temperature)]
    completions = served.generate(requests)
    assert_right(weights, requests, completions, {served.version})
    assert len({tuple(completion.tokens) for completion in completions}) == (16 if temperature else 4)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_k": 20, "top_p": 0.7}])
def test_log_probabilities_of_a_cut_vocabulary_are_of_what_was_drawn_from(
    served: Served, weights: Weights, cut: dict[str, Any]
) -> None:
    requests = group(5, 4, 24, **cut)
    for request, completion in zip(requests, served.generate(requests), strict=True):
        whole = weights.logprobs(served.version, request, completion)
        gained = [told - value for told, value in zip(completion.logprobs, whole, strict=True)]
        assert all(-CLOSE < value for value in gained) and max(gained) > 0.1
        assert all(value < CLOSE for value in completion.logprobs)


def test_a_stop_token_ends_a_response(served: Served) -> None:
    [greedy] = served.generate(group(6, 1, 8, temperature=0.0))
    stop = greedy.tokens[3]
    [completion] = served.generate(group(6, 1, 8, temperature=0.0, stop_tokens=(stop,)))
    assert completion.finish == "stop" and completion.tokens == greedy.tokens[: greedy.tokens.index(stop) + 1]


def test_aborted_requests_keep_their_tokens_and_the_others_go_on(served: Served, weights: Weights) -> None:
    requests = group(7, 11, LONG)  # the name of 7/1 begins that of 7/10
    started = []
    for request in requests:  # in calls of their own: a call comes back when all of it is done
        started.append(served.start([request]))
        time.sleep(0.02)
    writing(served, 11)
    served.ask("abort", ["7/1", "no such"])
    [cut] = started[1].result(30)
    assert not any(one.done() for one in (*started[:1], *started[2:]))
    served.ask("abort", None)
    completions = [cut, *(one.result(30)[0] for one in (*started[:1], *started[2:]))]
    for request, completion in zip([requests[1], *requests[:1], *requests[2:]], completions, strict=True):
        assert completion.finish == "abort" and 0 < len(completion.tokens) < LONG
        assert apart(weights, request, completion) < CLOSE


def test_a_paused_server_writes_nothing_and_then_goes_on(served: Served, weights: Weights) -> None:
    requests = group(8, 4, 200)
    began = time.monotonic()
    served.generate(requests)
    took = time.monotonic() - began
    started = served.start(requests)
    writing(served, 4)
    served.ask("pause")
    late: Future[list[Completion]] = served.start(group(9, 1, 8))
    time.sleep(took + 1)
    assert not started.done() and not late.done()
    served.ask("resume")
    assert_right(weights, requests, started.result(60), {served.version})
    assert_right(weights, group(9, 1, 8), late.result(60), {served.version})


def test_a_request_can_be_aborted_while_the_engine_is_paused(served: Served, weights: Weights) -> None:
    [request] = group(10, 1, LONG)
    started = served.start([request])
    writing(served, 1)
    served.ask("pause")
    served.ask("abort", ["10/0"])
    [completion] = started.result(30)
    served.ask("resume")
    # Not all that it has: of a request that waits for its turn only those tokens come back of which the scheduler has
    # told by then, and it tells of every fiftieth.
    assert completion.finish == "abort" and len(completion.tokens) < LONG
    assert apart(weights, request, completion) < CLOSE


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_outside_an_update_are_refused_by_both(served: Served) -> None:
    bucket = wire.Tensors((Sending("nobody", "127.0.0.1", 1, 1, BUCKET, 1.0).payload(),), wire.RECEIVE)
    with pytest.raises(TransportError, match="weights arrived outside an update; call begin_update first"):
        served.ask("load", bucket)
    asked = served.live().call.post(*wire.update(bucket, "1@m"))
    with pytest.raises(Declined, match="must run between begin_weight_update.. and end_weight_update"):
        served.worker.turning.submit(asked).result(30)
    assert served.ask("health")["refuses"] == "" and not served.ask("health")["restarts"]


def test_version_0_is_what_the_server_read_from_disk(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    before, sizes = served.ask("checksums"), [tensor.nbytes for _, tensor in weights.tensors(0)]
    assert push(served, transport, weights, 0) == {"bytes": float(sum(sizes)), "tensors": float(len(sizes))}
    assert served.ask("checksums") == before


def test_an_update_is_what_is_sampled_next(served: Served, transport: BroadcastTransport, weights: Weights) -> None:
    version = served.version + 1
    requests = [r for g in range(20, 24) for r in group(g, 4, 24)]
    served.generate(requests)  # prompts that old weights have read
    push(served, transport, weights, version)
    completions = served.generate(requests)
    assert_right(weights, requests, completions, {version})
    for request, completion in zip(requests, completions, strict=True):
        old = weights.logprobs(version - 1, request, completion)
        assert max(abs(a - b) for a, b in zip(old, completion.logprobs, strict=True)) > FAR


def test_requests_in_flight_go_on_with_the_new_weights(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    """Both versions' tokens have the log-probabilities that their own weights give them behind all that came before."""
    old, requests = served.version, group(30, 4, LONG)
    started = served.start(requests)
    writing(served, 4)
    servers = [served.ask("begin_update", old + 1)]
    late = served.start(group(31, 1, 8))  # waits in the server
    transport.send(weights.tensors(old + 1), verify=False, servers=servers)
    assert not started.done() and not late.done()
    served.ask("end_update")
    served.version = old + 1
    assert_right(weights, requests, started.result(120), {old, old + 1})
    assert_right(weights, group(31, 1, 8), late.result(60), {old + 1})


def test_in_place_they_go_on_over_the_keys_and_values_of_the_old_ones(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    """And whoever asks later reads the same prompt by the new ones, which is all that can tell them apart."""
    old, requests, later = served.version, group(33, 4, LONG), group(33, 4, 24)
    with keeping(served) as kept:
        started = kept.start(requests)
        writing(served, 4)
        push(served, transport, weights, old + 1)
        completions = started.result(120)
        assert_right(weights, later, kept.generate(later), {old + 1})
    push(served, transport, weights, old + 2)  # has the server forget
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.tokens) == LONG and completion.versions == sorted(completion.versions)
        assert set(completion.versions) == {old, old + 1}
        # Decoding runs a step ahead, so the old weights may have read the last token that they wrote. Then SGLang takes
        # those keys and values back once it finds that it has two of them: behind one new token, or behind two.
        off = []
        for found_after in (0, 1, 2):
            pairs = zip(weights.in_place(request, completion, found_after), completion.logprobs, strict=True)
            off.append(max(abs(a - b) for a, b in pairs))
        assert min(off) < CLOSE, off
        assert apart(weights, request, completion) > FAR, "all of it was computed anew"


def test_an_update_comes_through_while_the_engine_is_paused(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    old, requests = served.version, group(32, 2, LONG)
    started = served.start(requests)
    writing(served, 2)
    served.ask("pause")
    push(served, transport, weights, old + 1)
    time.sleep(1)
    assert not started.done()
    served.ask("resume")
    assert_right(weights, requests, started.result(120), {old, old + 1})


def test_two_pipeline_stages_send_their_own_layers(
    served: Served, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a group of its own; what one of them sends is not the whole model. Every tensor is compared, of an update
    that SGLang's model was not asked to load."""
    transports = []
    for rank in range(2):
        transports.append(BroadcastTransport(1, BUCKET, 120))
        layout = Layout(rank=rank, world=2, dp_rank=0, dp_size=1, last_stage=rank == 1, reports=rank == 0)
        transports[rank].connect([served.worker], layout)

    def part(rank: int, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        first = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
        return ((name, tensor) for name, tensor in weights.tensors(version) if name.startswith(first) is (rank == 0))

    version = served.version
    for number in (version + 1, 0, version + 1):
        servers = [served.ask("begin_update", number)]
        with ThreadPoolExecutor(2) as ranks:
            sent = [ranks.submit(transports[rank].send, part(rank, number), not number, servers) for rank in range(2)]
            assert all(one.result(120)["tensors"] > 10 for one in sent)
        served.ask("end_update")  # version 0 must be what the server read from disk
    served.version = version + 1
    assert capsys.readouterr().out.count("buckets are loaded from now on as the model did it") == len(transports)
    for transport in transports:
        transport.close()
    requests = group(34, 4, 24)
    assert_right(weights, requests, served.generate(requests), {served.version})


def test_an_update_that_changed_nothing_costs_no_restart(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    requests = group(40, 2, 8)
    served.ask("begin_update", 1)
    started = served.start(requests)
    served.ask("abort_update")
    assert_right(weights, requests, started.result(60), {served.version})
    push(served, transport, weights, served.version + 1)  # no session is left open
    assert_right(weights, requests, served.generate(requests), {served.version})
    assert not served.ask("health")["restarts"]


# -- the server's end ------------------------------------------------------------------------------------------------


def test_an_update_cut_short_is_never_served(served: Served, transport: BroadcastTransport, weights: Weights) -> None:
    """Its successor serves the whole weights that come next, also to who asked the server that is gone."""
    leader, requests = leader_of(served), group(50, 4, LONG)
    assert len(living(leader)) >= 5  # two guards, the web server, a scheduler, a detokenizer
    started = served.start(requests)
    writing(served, 4)
    servers = [served.ask("begin_update", 1)]

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(weights.tensors(served.version + 1)):
            if i == 40:
                raise ConnectionError("the rank is gone")
            yield pair

    with pytest.raises(ConnectionError, match="the rank is gone"):
        transport.send(cut(), verify=False, servers=servers)
    assert served.worker.engine._update.loads, "some weights had been overwritten"
    served.ask("abort_update")
    with pytest.raises(EngineError, match="was cut short; its successor serves nothing until whole weights arrive"):
        served.ask("address")
    served.live()
    assert not living(leader) and not started.done()
    push(served, transport, weights, served.version + 1)
    assert_right(weights, requests, started.result(120), {served.version})
    assert served.ask("health")["restarts"] == 1


def test_what_the_server_cannot_load_is_told_in_its_last_words(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    """What Miles has SGLang call raises, and that ends the scheduler."""
    restarts = served.ask("health")["restarts"]
    servers = [served.ask("begin_update", 1)]
    odd = ((name, t[:64].clone() if name == "model.norm.weight" else t) for name, t in weights.tensors(0))
    with pytest.raises(TransportError, match=r"engine-0 did not load model(?s:.)*weights were not loaded, at bucket"):
        transport.send(odd, verify=False, servers=servers)
    served.ask("abort_update")
    push(served, transport, weights, served.version + 1)
    assert_right(weights, group(60, 2, 8), served.generate(group(60, 2, 8)), {served.version})
    assert served.ask("health")["restarts"] == restarts + 1


def test_what_is_not_the_model_on_disk_is_not_served_as_version_0(
    served: Served, transport: BroadcastTransport, weights: Weights
) -> None:
    count, spoiled = len(served.ask("checksums")), "model.layers.1.mlp.down_proj.weight"
    servers = [served.ask("begin_update", 0)]
    transport.send(
        ((name, t + 1 if name == spoiled else t) for name, t in weights.tensors(0)), verify=True, servers=servers
    )
    with pytest.raises(TransportError, match=f"1 of {count} tensors are not what .* such as 0/{spoiled}"):
        served.ask("end_update")
    served.ask("abort_update")
    with pytest.raises(EngineError, match="an update of its weights was cut short"):
        served.ask("address")


def test_nothing_is_left_when_the_engine_is_closed(served: Served, folder: Path) -> None:
    """Though its server's successor is just starting."""
    groups = {
        os.getpgid(int(told.split()[0])) for told in until(lambda: processes_of(str(folder)), 60, "servers are there")
    }
    served.ask("close")
    assert not any(living(group) for group in groups) and not processes_of(str(folder))
