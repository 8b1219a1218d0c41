"""Weights to an engine on the same GPUs: it opens the trainer's memory by CUDA IPC, so nothing is sent but handles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...types import Layout
from ..protocols import TransportError, Worker
from ..sharing import HERE
from . import wire
from .bucket import Flat, Lone, Place, buckets, names_of
from .proof import Proving

FLATS = 2  # one is filled while the engine loads the other; every load has a price of its own, so few large ones


class HandleTransport:
    """Implements ``miles_core.types.Transport`` where the ranks of an engine's GPUs are the trainers of these GPUs.

    Every rank is given every tensor and lays it into a bucket of its own GPU; the first rank of each engine hands the
    engine the handles of all. Some buckets are filled while the engine loads others; it has the next one at hand when
    it is done, so nobody waits for a reply but to fill that bucket again.
    """

    def __init__(self, gpus: int, bucket_bytes: int, timeout_s: float, every: int = 0) -> None:
        """``gpus`` of an engine. An engine that has not loaded a bucket in ``timeout_s`` counts as dead.
        Whether all arrived is found out when that is asked for, and ``every`` so many updates."""
        self._gpus, self._timeout = gpus, timeout_s
        self._proving = Proving(every)
        self._flats = [Flat(bucket_bytes) for _ in range(FLATS)]
        self._payloads: dict[tuple[int, str], tuple[list[Place], str]] = {}  # by buffer and first tensor
        self._pool = ThreadPoolExecutor(FLATS + 1, thread_name_prefix="weights")  # and for what else it is told

    def connect(self, engines: list[Worker], layout: Layout) -> None:
        """Enter the group of the ranks that share an engine. A collective of all ranks."""
        self._engine, self._first = engines[layout.rank // self._gpus], layout.rank % self._gpus == 0
        sharing = [list(range(at, at + self._gpus)) for at in range(0, layout.world, self._gpus)]
        self._group = dist.new_subgroups_by_enumeration(sharing)[0] if self._gpus > 1 else None  # type: ignore[no-untyped-call]
        _serialize([], None)  # what it imports takes seconds

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool, servers: list[str]) -> dict[str, float]:
        """Returns ``bytes`` and ``tensors``. With ``verify`` the engines find out whether all arrived; see ``proof``.

        Raises TransportError naming the tensors and the engine.
        """
        sent = count = 0
        loading: list[Future[None]] = []
        kept: deque[Tensor] = deque(maxlen=FLATS)  # an engine may still read these
        staying = self._pool.submit(self._stay, self._room())
        try:
            if self._proving.now(verify) and (told := self._said(self._prove())):
                raise TransportError(told)
            for flat in buckets(tensors, self._flats):
                sent, count = sent + flat.used, count + len(flat.places)
                kept.append(flat.tensor.clone() if isinstance(flat, Lone) else flat.tensor)
                payloads = self._gathered(self._payload(flat, kept[-1]))
                if self._first:
                    bucket = wire.Tensors(tuple(payloads), "flattened_bucket")
                    loading.append(self._pool.submit(self._load, bucket, names_of(flat.places)))
                self._settle(loading, FLATS - 1)  # the oldest is filled next
            self._settle(loading, 0)
        finally:
            wait(loading)  # the engine reads these buckets; what else goes wrong follows from what is raised already
        HERE.stays = self._said(staying.result())
        return {"bytes": float(sent), "tensors": float(count)} if self._first else {}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _payload(self, bucket: Flat | Lone, tensor: Tensor) -> str:
        """What the engine opens a bucket by: the same as in the last update, where the same tensors are there again.

        PyTorch wraps a storage each time its handle is made, and in the end gives up telling the other process when
        it has been filled; so a buffer's handle is made once, and filled before it is handed on.
        """
        if isinstance(bucket, Lone):
            return _serialize(bucket.places, tensor)
        key = tensor.data_ptr(), bucket.places[0].name
        places, payload = self._payloads.get(key, ([], ""))
        if places != bucket.places:
            payload = _serialize(bucket.places, tensor)
            self._payloads[key] = bucket.places, payload
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
        return payload

    def _prove(self) -> str:
        """Have the engine find out whether all arrives. Returns what went wrong."""
        try:
            if self._first:
                self._engine.ask("prove", timeout=self._timeout)
        except Exception as error:
            return f"{self._engine.name} was to find out whether all weights arrive: {error}"
        return ""

    def _gathered(self, payload: str) -> list[str]:
        if self._group is None:
            return [payload]
        payloads: list[Any] | None = [None] * self._gpus if self._first else None
        dist.gather_object(payload, payloads, group=self._group, group_dst=0)
        return payloads or []

    def _room(self) -> int:
        """What the fullest of the engine's GPUs has for it."""
        rooms: list[Any] = [HERE.room()] * self._gpus
        if self._group is not None:
            dist.all_gather_object(rooms, rooms[0], group=self._group)
        return int(min(rooms))

    def _stay(self, room: int) -> bool:
        """Whether the engine will keep its memory while the ranks train next."""
        return self._first and bool(self._engine.ask("stay", room, timeout=self._timeout))

    def _said[T](self, value: T) -> T:
        """What the first rank was told, on every rank."""
        said: list[Any] = [value]
        if self._group is not None:
            dist.broadcast_object_list(said, group=self._group, group_src=0)
        first: T = said[0]
        return first

    def _load(self, bucket: wire.Tensors, names: str) -> None:
        try:
            self._engine.ask("load", bucket, timeout=self._timeout)
        except Exception as error:
            raise TransportError(f"{self._engine.name} did not load {names}: {error}") from error

    def _settle(self, loading: list[Future[None]], most: int) -> None:
        """Wait until the engine has at most so many buckets to load. Raises what went wrong first, on every rank: they
        fill again what the engine has read, and none waits for one that gave up."""
        fault: BaseException | None = None
        while len(loading) > most and fault is None:
            fault = loading.pop(0).exception()
        if told := self._said(str(fault or "")):
            raise fault or TransportError(told)


def _serialize(places: list[Place], tensor: Tensor | None) -> str:
    """What SGLang opens a bucket by: base64 of its own pickle, in which a GPU goes by its name, not its number."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    monkey_patch_torch_reductions()
    if tensor is None:
        return ""
    told = [FlattenedTensorMetadata(p.name, p.shape, p.dtype, p.start, p.end, p.end - p.start) for p in places]
    payload = {"flattened_tensor": tensor, "metadata": told}
    serialized: str = MultiprocessingSerializer.serialize(payload, output_str=True)
    return serialized
