"""New weights in place: whole or not at all, and every token knows which it was written by."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.local.server import LocalEngine
from miles_core.edges.protocols import Bucket, EngineError, Piece, Request, Sampling, TransportError
from miles_core.edges.transport.shm import SharedMemoryTransport
from miles_core.types import Layout

REQUESTS = [Request(str(i), list(range(1, 4 + i)), Sampling(30), seed=i) for i in range(3)]


@contextmanager
def bucket_of(tensors: dict[str, torch.Tensor], verify: bool = False) -> Iterator[Bucket]:
    """A bucket as a sender fills it."""
    data, pieces = bytearray(), []
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        checksum = zlib.crc32(raw) if verify else None
        pieces.append(Piece(name, dtype, tuple(tensor.shape), len(data), len(raw), checksum))
        data += raw + bytes(-len(raw) % 64)
    with NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield Bucket(file.name, tuple(pieces))


async def update(engine: LocalEngine, tensors: dict[str, torch.Tensor], version: int) -> dict[str, int]:
    await engine.begin_update(version)
    with bucket_of(tensors, verify=True) as bucket:
        checksums = await engine.load(bucket)
    assert 0 <= await engine.end_update() <= 1
    return checksums


def test_an_update_tells_in_what_share_of_the_time_before_it_tokens_were_written(tiny: Any) -> None:
    """A clock, which is the same for every family."""
    engine, tensors = engine_of(tiny("qwen3")), tiny("qwen3", seed=1).parameters()

    async def share(idle: float, version: int) -> tuple[float, float]:
        """What the engine says of a second of work at the least and ``idle`` seconds, and what is true."""
        began = time.monotonic()
        while (busy := time.monotonic() - began) < 1.0:
            await engine.generate(REQUESTS)
        await asyncio.sleep(idle)
        await engine.begin_update(version)
        with bucket_of(tensors) as bucket:
            await engine.load(bucket)
        told = await engine.end_update()
        return told, busy / (time.monotonic() - began)

    async def go() -> None:
        await update(engine, tensors, 1)
        for version, idle in ((2, 0.0), (3, 1.0), (4, 3.0)):
            told, true = await share(idle, version)
            assert told == pytest.approx(true, abs=0.1)

    asyncio.run(go())


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama-biased"])
def pair(request: pytest.FixtureRequest, tiny: Any) -> tuple[Any, Any]:
    return tiny(request.param), tiny(request.param, seed=1)


def engine_of(tiny: Any) -> LocalEngine:
    return LocalEngine(str(tiny.folder), None, 8, 64)


def test_updated_weights_are_the_new_models(pair: tuple[Any, Any]) -> None:
    old, new = pair
    engine = engine_of(old)

    async def go() -> Any:
        checksums = await update(engine, new.parameters(), 1)
        want = {k: zlib.crc32(v.contiguous().view(torch.uint8).numpy()) for k, v in new.parameters().items()}
        assert checksums == want  # read back from the fused, permuted weights
        return await engine.generate(REQUESTS)

    updated, fresh = asyncio.run(go()), asyncio.run(engine_of(new).generate(REQUESTS))
    assert [(c.tokens, c.logprobs) for c in updated] == [(c.tokens, c.logprobs) for c in fresh]
    assert all(set(c.versions) == {1} for c in updated)


def test_an_update_in_the_middle_keeps_older_tokens_and_marks_the_newer(pair: tuple[Any, Any]) -> None:
    old, new = pair
    engine = engine_of(old)

    async def go() -> Any:
        task = asyncio.ensure_future(engine.generate(REQUESTS))
        while engine._batch.generated < 30:
            await asyncio.sleep(0)
        await update(engine, new.parameters(), 5)
        return await task

    undisturbed = asyncio.run(engine_of(old).generate(REQUESTS))
    for request, mixed, before in zip(REQUESTS, asyncio.run(go()), undisturbed, strict=True):
        n = mixed.versions.count(0)
        assert 0 < n < 30 and mixed.versions == [0] * n + [5] * (30 - n)
        assert (mixed.tokens[:n], mixed.logprobs[:n]) == (before.tokens[:n], before.logprobs[:n])
        later = torch.tensor(mixed.logprobs[n:])
        assert not torch.allclose(later, old.logprobs(request.tokens, mixed.tokens)[n:], atol=1e-2)
        want = continued(old, new, request.tokens + mixed.tokens, len(request.tokens) + n - 1)
        torch.testing.assert_close(later, want, atol=2e-5, rtol=0)


def continued(old: Any, new: Any, tokens: list[int], cut: int) -> torch.Tensor:
    """Log-probabilities of ``tokens[cut + 1:]`` under ``new``, over the keys and values that ``old`` made before."""
    with torch.no_grad():
        cache = old.model(torch.tensor([tokens[:cut]]), use_cache=True).past_key_values
        logits = new.model(torch.tensor([tokens[cut:-1]]), past_key_values=cache).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[cut + 1 :])[:, None])[:, 0]


def test_a_prompt_is_computed_again_after_an_update(pair: tuple[Any, Any]) -> None:
    """A group that waits while its first attempts run must not share their prompt of older weights."""
    old, new = pair
    engine = LocalEngine(str(old.folder), None, 2, 64)
    requests = [Request(str(i), [1, 2, 3], Sampling(12), seed=i) for i in range(4)]

    async def go() -> Any:
        task = asyncio.ensure_future(engine.generate(requests))
        while engine._batch.generated < 4:
            await asyncio.sleep(0)
        await update(engine, new.parameters(), 1)
        return await task

    completions = asyncio.run(go())
    for completion in completions[2:]:
        assert set(completion.versions) == {1}
        want = new.logprobs([1, 2, 3], completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-5, rtol=0)


def test_bfloat16_arrives_exactly(pair: tuple[Any, Any]) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in pair[1].parameters().items()}
    checksums = asyncio.run(update(engine_of(pair[0]), halves, 1))
    assert checksums == {k: zlib.crc32(v.contiguous().view(torch.uint8).numpy()) for k, v in halves.items()}


class InProcess:
    """A worker whose engine lives in this process; ``ask`` comes from the sender's threads."""

    def __init__(self, engine: LocalEngine) -> None:
        self.name, self.engine = "engine-0", engine

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return asyncio.run(getattr(self.engine, method)(*args))


@pytest.mark.parametrize("bucket_bytes", [2**20, 4096], ids=["one bucket", "many, and tensors larger than one"])
def test_the_shared_memory_transport_moves_a_whole_model(pair: tuple[Any, Any], bucket_bytes: int) -> None:
    old, new = pair
    engine = engine_of(old)
    sender = SharedMemoryTransport(bucket_bytes, timeout_s=10.0)
    sender.connect([InProcess(engine)], Layout(0, 1, 0, 1, True, True))
    asyncio.run(engine.begin_update(1))
    sender.send(iter(new.parameters().items()), verify=True, servers=[""])
    asyncio.run(engine.end_update())
    sender.close()
    assert asyncio.run(engine.generate(REQUESTS))[0].tokens == asyncio.run(engine_of(new).generate(REQUESTS))[0].tokens
    for name, tensor in new.parameters().items():
        assert torch.equal(engine._weights.targets[name].read(), tensor)


# -- never a mixture -------------------------------------------------------------------------------------------------


def test_nothing_is_served_between_begin_and_end(pair: tuple[Any, Any]) -> None:
    engine = engine_of(pair[0])

    async def go() -> None:
        running = asyncio.ensure_future(engine.generate(REQUESTS))
        await asyncio.sleep(0)
        await engine.begin_update(1)
        written = engine._batch.generated
        asked = asyncio.ensure_future(engine.generate(REQUESTS))
        await asyncio.sleep(0.05)
        assert engine._batch.generated == written and not asked.done()
        await engine.abort_update()  # nothing had arrived: the old weights are whole
        assert {v for c in (*await running, *await asked) for v in c.versions} == {0}

    asyncio.run(go())


def test_retracted_requests_go_on_as_if_new_weights_had_read_them(pair: tuple[Any, Any]) -> None:
    """Under equal weights they end as they would have; under others, each token's log-probability is the new model's
    of the whole sequence, which it is not where the keys and values of older tokens were kept."""
    old, new = pair

    def interrupted(tiny: Any, retract: bool) -> list[Any]:
        engine = LocalEngine(str(old.folder), None, 8, 64, retract)

        async def go() -> list[Any]:
            running = asyncio.ensure_future(engine.generate(REQUESTS))
            while engine._batch.generated < 30:
                await asyncio.sleep(0)
            await update(engine, tiny.parameters(), 1)
            return await running

        return asyncio.run(go())

    whole = asyncio.run(engine_of(old).generate(REQUESTS))
    assert [c.tokens for c in interrupted(old, True)] == [c.tokens for c in whole]
    kept, again = interrupted(new, False), interrupted(new, True)
    gaps = []
    for done in (kept, again):
        gap = 0.0
        for request, completion in zip(REQUESTS, done, strict=True):
            assert set(completion.versions) == {0, 1}
            first = completion.versions.index(1)
            found = new.logprobs(request.tokens, completion.tokens)[first:]
            gap = max(gap, float((found - torch.tensor(completion.logprobs[first:])).abs().max()))
        gaps.append(gap)
    assert gaps[1] < 1e-4 < gaps[0]


def test_half_an_update_is_never_served(pair: tuple[Any, Any]) -> None:
    old, new = pair
    engine = engine_of(old)
    first = dict(list(new.parameters().items())[:1])

    async def go() -> Any:
        running = asyncio.ensure_future(engine.generate(REQUESTS))
        await asyncio.sleep(0)
        await engine.begin_update(1)
        with bucket_of(first) as bucket:
            await engine.load(bucket)
        with pytest.raises(TransportError, match=r"of \d+ tensors \d+ did not arrive, such as model\."):
            await engine.end_update()
        await engine.abort_update()
        for call in (running, engine.generate(REQUESTS)):
            with pytest.raises(EngineError, match="cut short"):
                await call
        await engine.begin_update(1)  # an update that brings nothing does not mend it either
        await engine.abort_update()
        with pytest.raises(EngineError, match="cut short"):
            await engine.generate(REQUESTS)
        await update(engine, new.parameters(), 2)
        return await engine.generate(REQUESTS)

    assert {v for c in asyncio.run(go()) for v in c.versions} == {2}


def test_a_tensor_that_comes_twice_is_refused(pair: tuple[Any, Any]) -> None:
    engine, tensors = engine_of(pair[0]), pair[1].parameters()

    async def go() -> None:
        await engine.begin_update(1)
        for part in (tensors, {"model.norm.weight": tensors["model.norm.weight"]}):
            with bucket_of(part) as bucket:
                await engine.load(bucket)
        await engine.end_update()

    with pytest.raises(TransportError, match="1 arrived more than once, such as model.norm.weight"):
        asyncio.run(go())


@settings(max_examples=20)
@given(arrivals=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_an_update_ends_only_when_each_tensor_arrived_once(tiny: Any, arrivals: list[int]) -> None:
    engine, parameters = engine_of(tiny("qwen3")), list(tiny("qwen3").parameters().items())
    parts = [dict(parameters[i::6]) for i in range(6)]

    async def go() -> None:
        await engine.begin_update(1)
        for times, part in zip(arrivals, parts, strict=True):
            with bucket_of(part) as bucket:
                for _ in range(times):
                    await engine.load(bucket)
        await engine.end_update()

    if arrivals == [1] * 6:
        asyncio.run(go())
    else:
        with pytest.raises(TransportError):
            asyncio.run(go())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", (31,), r"model\.norm\.weight: arrived with shape \[31\], the model .* has \[32\]"),
        ("model.extra", (2,), r"model\.extra: the model in the engine has no such weight"),
    ],
)
def test_tensors_of_another_model_are_refused(
    pair: tuple[Any, Any], name: str, shape: tuple[int, ...], message: str
) -> None:
    engine = engine_of(pair[0])

    async def go() -> None:
        await engine.begin_update(1)
        with bucket_of({name: torch.zeros(shape)}) as bucket:
            await engine.load(bucket)

    with pytest.raises(TransportError, match=message):
        asyncio.run(go())


def test_weights_outside_an_update_are_refused(pair: tuple[Any, Any]) -> None:
    engine = engine_of(pair[0])
    with bucket_of(pair[1].parameters()) as bucket, pytest.raises(TransportError, match="begin_update first"):
        asyncio.run(engine.load(bucket))
    with pytest.raises(TransportError, match="without begin_update"):
        asyncio.run(engine.end_update())


def test_a_segment_that_is_gone_is_named(pair: tuple[Any, Any]) -> None:
    engine = engine_of(pair[0])

    async def go() -> None:
        await engine.begin_update(1)
        await engine.load(Bucket("/proc/0/fd/3", ()))

    with pytest.raises(TransportError, match="/proc/0/fd/3: No such file or directory; its sender is gone"):
        asyncio.run(go())
