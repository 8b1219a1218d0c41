"""Whether all weights arrived is found out with the first update, and on demand."""

from __future__ import annotations

import asyncio

import pytest
from miles_core.edges.protocols import TransportError
from miles_core.edges.sglang import wire
from miles_core.edges.sglang.client import SGLangClient
from sglang_cases import InProcess, assert_whole, calls, engines, fault, group, push, weights


def test_version_0_must_be_the_model_on_disk(dialect: str) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.ready()
            await push(worker, 0)
            await worker.engine.begin_update(0)
            await worker.engine.load(weights(a=0, b=1))
            with pytest.raises(TransportError, match=r"1 of 2 tensors are not what the server read.*such as 0/b"):
                await worker.engine.end_update()
            await worker.engine.abort_update()
            assert worker.engine._restarts == 1

    asyncio.run(go())


async def proved(worker: InProcess, version: int, *buckets: wire.Tensors) -> None:
    await worker.engine.begin_update(version)
    await worker.engine.prove()
    for bucket in buckets:
        await worker.engine.prove()  # another rank that sends asks for it too
        await worker.engine.load(bucket)
    await worker.engine.end_update()


@pytest.mark.parametrize("version", [0, 7])
def test_a_tensor_that_never_arrives_is_found_out(dialect: str, version: int) -> None:
    """Also where the server has it from the disk, for it is made random. Version 7 is that of a resumed run."""

    async def go() -> None:
        async with engines(dialect) as [worker]:
            await worker.engine.ready()
            why = "what the server read from disk" if version == 0 else "did not arrive"
            with pytest.raises(TransportError, match=rf"1 of 2 tensors .*{why}, such as 0/b"):
                await proved(worker, version, weights(a=version))
            await worker.engine.abort_update()
            await proved(worker, version, weights(a=version), weights(b=version))
            request = group(0, 1)[0]
            assert_whole(request, (await SGLangClient([worker], 10).generate([request]))[0], [version] * 6)
            asked = await calls(worker)
            assert asked.count("/weights_checker") == 4  # whether it has any, made random, random, behind

    asyncio.run(go())


def test_a_server_without_checksums_says_so_and_serves(dialect: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def go() -> None:
        async with engines(dialect) as [worker]:
            await fault(worker, no_checksums=True)
            await worker.engine.ready()
            await proved(worker, 3, weights(a=3, b=3))
            assert_whole(group(0, 1)[0], (await SGLangClient([worker], 10).generate(group(0, 1)))[0], [3] * 6)

            asked = await calls(worker)
            await worker.engine.ready()  # as before each update; by now its weights are not those of the disk
            assert (await calls(worker)).count("/weights_checker") == asked.count("/weights_checker")

    asyncio.run(go())
    said = capfd.readouterr().out
    assert "weights that arrive are not compared: the SGLang server has no checksums: /weights_checker" in said
