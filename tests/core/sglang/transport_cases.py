"""Engines and the parts of SGLang that transports need, without SGLang: real groups of threads, numbers for handles."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from miles_core.edges.protocols import WorkerDied
from miles_core.edges.sglang import wire
from miles_core.edges.sglang.receive import Sending, receiver_of
from miles_core.types import Layout

LAYOUT = Layout(rank=0, world=1, dp_rank=0, dp_size=1, last_stage=True, reports=True)
HANDLES: list[Any] = []  # what was made a handle of; whoever opens one sees what is there now


def tensors(n: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3 + i, 5, generator=made).to(torch.bfloat16) for i in range(n)}


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of SGLang that trainers use, with a number in place of a handle."""
    HANDLES.clear()

    class MultiprocessingSerializer:
        @staticmethod
        def serialize(obj: Any, output_str: bool) -> str:
            assert output_str
            HANDLES.append(obj)
            return base64.b64encode(b"%d" % (len(HANDLES) - 1)).decode()

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("sglang")
    module("sglang.srt")
    module(
        "sglang.srt.utils", MultiprocessingSerializer=MultiprocessingSerializer, init_custom_process_group=enter_group
    )
    module("sglang.srt.utils.patch_torch", monkey_patch_torch_reductions=lambda: None)
    module("sglang.srt.weight_sync")
    module("sglang.srt.weight_sync.tensor_bucket", FlattenedTensorMetadata=Metadata)


class Metadata:
    def __init__(self, name: str, shape: Any, dtype: Any, start_idx: int, end_idx: int, numel: int) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.start_idx, self.end_idx = start_idx, end_idx
        assert numel == end_idx - start_idx


def enter_group(
    backend: str, init_method: str, timeout: Any, world_size: int, rank: int, group_name: str
) -> torch.distributed.ProcessGroup:
    """A group apart from the default one; members may be threads of one process."""
    host, port = init_method.removeprefix("tcp://").split(":")
    assert backend == "gloo"
    store = torch.distributed.TCPStore(host, int(port), world_size, rank == 0, timeout=timeout, wait_for_workers=False)
    group: torch.distributed.ProcessGroup = torch.distributed.ProcessGroupGloo(
        torch.distributed.PrefixStore(group_name, store), rank, world_size, timeout
    )
    return group


# -- engines -----------------------------------------------------------------------------------------------------------


class Engine:
    """A worker that receives as SGLang does: whole buckets, into its own memory."""

    def __init__(self, name: str, width: int = 1) -> None:
        self.name, self.width = name, width
        self.got: list[dict[str, torch.Tensor]] = [{} for _ in range(width)]
        self.groups: dict[str, list[Any]] = {}
        self.error: Exception | None = None
        self.loads, self.proved = 0, list[int]()
        self.stays, self.rooms, self.killed = False, list[int](), False
        self.server = ThreadPoolExecutor(1)  # does one thing after another, as it is told them
        self.sending = threading.Lock()

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method in ("take_turn", "end_turn"):
            return await asyncio.to_thread(getattr(self, method))
        answer = asyncio.wrap_future(self.server.submit(getattr(self, method), *args))
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            self.killed = True  # as the cluster does with one that does not answer
            raise WorkerDied(f"{self.name} did not answer {method} within {timeout} s, and was killed") from None

    def take_turn(self) -> None:
        assert self.sending.acquire(timeout=20)

    def end_turn(self) -> None:
        self.sending.release()

    def prove(self) -> None:
        self.proved.append(self.loads)

    def leave(self, name: str) -> None:
        del self.groups[name]

    async def kill(self) -> None:
        raise NotImplementedError

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return getattr(self, method)(*args)

    def stay(self, room: int) -> bool:
        self.rooms.append(room)
        return self.stays

    def join(self, address: str, port: int, offset: int, world: int, name: str) -> None:
        from datetime import timedelta

        made: dict[int, Any] = {}

        def enter(i: int) -> None:
            made[i] = enter_group("gloo", f"tcp://{address}:{port}", timedelta(seconds=20), world, offset + i, name)

        threads = [threading.Thread(target=enter, args=(i,)) for i in range(self.width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.groups[name] = [made[i] for i in range(self.width)]

    def load(self, bucket: wire.Tensors) -> dict[str, int]:
        self.loads += 1
        if self.error:
            raise self.error
        assert len(bucket.serialized) == self.width
        opened = self.receive if bucket.load_format == wire.RECEIVE else self.open
        with ThreadPoolExecutor(self.width) as ranks:
            list(ranks.map(opened, range(self.width), bucket.serialized))
        return {}

    def open(self, rank: int, payload: str) -> None:
        told = HANDLES[int(base64.b64decode(payload))]
        for m in told["metadata"]:
            part = told["flattened_tensor"][m.start_idx : m.end_idx]
            self.got[rank][m.name] = part.view(m.dtype).view(m.shape).clone()

    def receive(self, rank: int, payload: str) -> None:
        """What ``receive.receive`` does, with the group at hand: in one process no two may have the same name."""
        [(told, empty)] = pickle.loads(base64.b64decode(payload))
        sending = Sending(**json.loads(told))
        receiver = receiver_of(self.groups[sending.group][rank], sending, empty.device)
        receiver.load(Model(self.got[rank]), sending)


class Model(torch.nn.Module):
    """Keeps a copy of what it is given."""

    def __init__(self, got: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.got = got

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.got[name] = tensor.clone()


def assert_arrived(engine: Engine, sent: dict[str, torch.Tensor]) -> None:
    for got in engine.got:
        assert got.keys() == sent.keys() and all(torch.equal(got[name], sent[name]) for name in sent)


class Late(Engine):
    """Is told of what rank 0 does after what rank 1 does."""

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method == "join" and args[-1].startswith("miles-0-"):
            await asyncio.sleep(0.5)
        return await super().call(method, *args)
