"""The local engine against transformers, and what it promises whoever calls it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.local.server import LocalEngine
from miles_core.edges.protocols import Completion, EngineError, Request, Sampling

FAMILIES = ("qwen2", "qwen3", "llama", "llama-biased")
VOCAB = 61


def engine_of(tiny: Any, max_batch: int = 64, context: int | None = None) -> LocalEngine:
    return LocalEngine(str(tiny.folder), context, max_batch, kv_mib=64)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def ragged(groups: int = 5, attempts: int = 4, **options: Any) -> list[Request]:
    """Groups of different prompts, of 1 to 29 tokens, whose attempts want different numbers of tokens."""
    return [
        Request(f"{g}/{i}", prompt(1 + 7 * g), Sampling(4 + 7 * i, stop_tokens=(3,), **options), seed=10 * g + i)
        for g in range(groups)
        for i in range(attempts)
    ]


def sample(engine: LocalEngine, requests: list[Request]) -> list[Completion]:
    return asyncio.run(engine.generate(requests))


def assert_recomputed(tiny: Any, requests: list[Request], completions: list[Completion], atol: float = 1e-5) -> None:
    for request, completion in zip(requests, completions, strict=True):
        want = tiny.logprobs(request.tokens, completion.tokens, request.sampling.temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=atol, rtol=0)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_batch", [64, 3], ids=["at once", "admitted one after another"])
def test_logprobs_are_those_of_transformers(tiny: Any, family: str, max_batch: int) -> None:
    model, requests = tiny(family), ragged()
    assert_recomputed(model, requests, sample(engine_of(model, max_batch), requests))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_logprobs_are_those_of_the_tempered_distribution(tiny: Any, temperature: float) -> None:
    model, requests = tiny("qwen3"), ragged(temperature=temperature)
    assert_recomputed(model, requests, sample(engine_of(model), requests))


def test_greedy_takes_the_best_token_and_reports_temperature_one(tiny: Any) -> None:
    model, requests = tiny("qwen3"), [Request("0", prompt(5), Sampling(12, temperature=0.0), seed=1)]
    [completion] = sample(engine_of(model), requests)
    assert_recomputed(model, requests, [completion])
    with torch.no_grad():
        logits = model.model(torch.tensor([requests[0].tokens + completion.tokens])).logits[0, 4:-1]
    assert logits.argmax(-1).tolist() == completion.tokens


def test_two_runs_are_equal_bit_for_bit(tiny: Any) -> None:
    model, requests = tiny("qwen3"), ragged()
    engine = engine_of(model, max_batch=7)
    assert sample(engine, requests) == sample(engine, requests) == sample(engine_of(model, 7), requests)


@settings(max_examples=12)
@given(order=st.permutations(range(20)), max_batch=st.integers(1, 24), take=st.integers(1, 20))
def test_neighbours_change_nothing(tiny: Any, order: list[int], max_batch: int, take: int) -> None:
    model, requests = tiny("qwen3"), ragged()
    alone = sample(engine_of(model), requests)
    mixed = sample(engine_of(model, max_batch), [requests[i] for i in order[:take]])
    for i, completion in zip(order[:take], mixed, strict=True):
        assert completion.tokens == alone[i].tokens
        assert completion.logprobs == pytest.approx(alone[i].logprobs, abs=1e-5)


def test_a_seed_decides_what_is_sampled(tiny: Any) -> None:
    model = tiny("qwen3")
    requests = [Request(str(i), prompt(4), Sampling(20), seed=seed) for i, seed in enumerate((1, 2, 1, 2**63 + 5))]
    first, second, again, large = (c.tokens for c in sample(engine_of(model), requests))
    assert first == again
    assert len({tuple(first), tuple(second), tuple(large)}) == 3


# -- when a completion ends ------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_completion_and_belong_to_it(tiny: Any) -> None:
    model, stops = tiny("qwen3"), tuple(range(20))
    requests = [Request(str(i), prompt(4), Sampling(40, stop_tokens=stops), seed=i) for i in range(8)]
    for completion in sample(engine_of(model), requests):
        assert completion.finish == "stop"
        assert [token in stops for token in completion.tokens] == [False] * (len(completion.tokens) - 1) + [True]


def test_max_tokens_and_the_context_end_a_completion(tiny: Any) -> None:
    requests = [Request(str(n), prompt(12), Sampling(n), seed=n) for n in (0, 1, 5, 100)]
    completions = sample(engine_of(tiny("qwen3"), context=32), requests)
    assert [len(c.tokens) for c in completions] == [0, 1, 5, 20]
    assert {c.finish for c in completions} == {"length"}
    assert all(len(c.tokens) == len(c.logprobs) == len(c.versions) for c in completions)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "no prompt tokens"), ([1] * 32, "32 prompt tokens leave no room in a context of 32"), ([1, 61], "token 61")],
)
def test_a_request_that_cannot_be_answered_is_named(tiny: Any, tokens: list[int], message: str) -> None:
    engine = engine_of(tiny("qwen3"), context=32)
    requests = [Request("7/0", prompt(3), Sampling(8), seed=0), Request("7/1", tokens, Sampling(8), seed=0)]
    with pytest.raises(EngineError, match=f"request 7/1: .*{message}"):
        sample(engine, requests)
    assert len(sample(engine, requests[:1])[0].tokens) == 8  # and it goes on


# -- one prefill for a group -----------------------------------------------------------------------------------------


def test_equal_prompts_are_computed_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, computed = engine_of(tiny("qwen3"), max_batch=4), []
    decoder = engine._batch._decoder
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda prompts, rows: computed.extend(prompts) or prefill(prompts, rows))
    requests = [Request(str(i), prompt(9), Sampling(3 + 5 * (i % 4)), seed=i) for i in range(11)]
    completions = sample(engine, requests)  # eleven rows of which four fit at once
    assert computed == [prompt(9)]
    assert_recomputed(tiny("qwen3"), requests, completions)
    assert not engine._batch._prompts  # nothing is kept of prompts that nobody uses


def test_finished_rows_leave_the_batch(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = engine_of(tiny("qwen3")), []
    decoder = engine._batch._decoder
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda tokens, *rest: sizes.append(len(tokens)) or decode(tokens, *rest))
    sample(engine, [Request(str(i), prompt(3 + i), Sampling(2 + 2 * i), seed=i) for i in range(4)])
    assert sizes == [4, 3, 3, 2, 2, 1, 1]


# -- abort, pause ----------------------------------------------------------------------------------------------------


def test_abort_completes_with_what_there_is(tiny: Any) -> None:
    model = tiny("qwen3")
    engine = engine_of(model, max_batch=2)
    requests = [Request(str(i), prompt(4 + i), Sampling(40), seed=i) for i in range(4)]

    async def go() -> list[Completion]:
        task = asyncio.ensure_future(engine.generate(requests))
        await until(lambda: engine._batch.generated >= 10)
        assert (await engine.health())["waiting"] == 2
        await engine.abort(["0", "3", "unknown"])
        return await task

    completions = asyncio.run(go())
    assert [c.finish for c in completions] == ["abort", "length", "length", "abort"]
    assert 0 < len(completions[0].tokens) < 40
    assert completions[3] == Completion([], [], [], "abort")
    assert_recomputed(model, requests[:3], completions[:3])


def test_abort_all(tiny: Any) -> None:
    engine = engine_of(tiny("qwen3"), max_batch=2)

    async def go() -> list[Completion]:
        task = asyncio.ensure_future(engine.generate([Request(str(i), [1], Sampling(40), seed=i) for i in range(4)]))
        await until(lambda: engine._batch.generated >= 5)
        await engine.abort(None)
        return await task

    assert {c.finish for c in asyncio.run(go())} == {"abort"}
    assert not engine._batch


def test_a_paused_engine_writes_nothing_and_goes_on(tiny: Any) -> None:
    model = tiny("qwen3")
    engine, requests = engine_of(model), [Request("0", prompt(4), Sampling(30), seed=0)]

    async def go() -> list[Completion]:
        task = asyncio.ensure_future(engine.generate(requests))
        await until(lambda: engine._batch.generated >= 5)
        await engine.pause()
        written = engine._batch.generated
        other = asyncio.ensure_future(engine.generate(requests))
        await asyncio.sleep(0.05)
        assert engine._batch.generated == written
        await engine.resume()
        assert (await other)[0].tokens == (await task)[0].tokens
        return await task

    assert_recomputed(model, requests, asyncio.run(go()))


def test_a_caller_that_gives_up_frees_its_rows(tiny: Any) -> None:
    engine = engine_of(tiny("qwen3"), max_batch=1)

    async def go() -> list[Completion]:
        task = asyncio.ensure_future(engine.generate([Request("0", prompt(4), Sampling(50), seed=0)]))
        await until(lambda: engine._batch.generated >= 3)
        task.cancel()
        return await engine.generate([Request("1", prompt(5), Sampling(4), seed=0)])

    assert len(asyncio.run(go())[0].tokens) == 4
    assert engine._batch.generated < 20


# -- weights that are no good ----------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_fail_the_requests_and_nothing_after(tiny: Any) -> None:
    engine = engine_of(tiny("qwen3"))
    requests = [Request("4/1", prompt(4), Sampling(4), seed=0), Request("4/2", prompt(20), Sampling(4), seed=0)]
    good = sample(engine, requests)
    engine._weights.layers[0].qkv.fill_(math.nan)
    with pytest.raises(EngineError, match="request 4/2: the model's logits are not finite; weights version 0"):
        sample(engine, requests[::-1])
    engine._weights.load(tiny("qwen3").folder)
    assert sample(engine, requests) == good  # the long prompt's keys and values were in the row of the short one


def test_a_folder_with_a_missing_tensor_is_refused(tiny: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny("qwen3").folder
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight \(1 missing"):
        LocalEngine(str(tmp_path), None, 4, 64)


def test_a_failure_inside_a_step_reaches_the_caller(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny("qwen3"))

    def broken(*_: Any) -> Awaitable[None]:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._batch._decoder, "decode", broken)
        with pytest.raises(EngineError, match="token step: RuntimeError: no memory"):
            sample(engine, [Request("0", [1], Sampling(4), seed=0)])
    assert len(sample(engine, [Request("0", [1], Sampling(4), seed=0)])[0].tokens) == 4
