"""Weights to engines on other GPUs: one broadcast a bucket, to all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

from torch import Tensor

from ...types import Layout
from ..protocols import TransportError, Worker
from . import wire
from .bucket import Flat, buckets
from .process import free_port, own_address


@dataclass(slots=True)
class Sent:
    """A bucket on its way."""

    names: str
    work: Any  # of the broadcast
    loads: list[tuple[Worker, Future[Any]]] = field(default_factory=list)


class BroadcastTransport:
    """Implements ``miles_core.types.Transport``. One process group a sender, so one a pipeline stage, with all engines.

    The group is made when the first tensor is to be sent, and anew when an engine is not in it any more. While a bucket
    travels and is loaded the next one is filled.
    """

    def __init__(self, width: int, bucket_bytes: int, timeout_s: float) -> None:
        """``width``: tensor-parallel ranks of an engine. Who has not received a bucket by ``timeout_s`` is dead."""
        self._width, self._timeout = width, timeout_s
        self._flats = Flat(bucket_bytes), Flat(bucket_bytes)
        self._group: Any = None
        self._name = ""
        self._numbers = count(1)
        self._engines: list[Worker] = []
        self._pool: ThreadPoolExecutor | None = None

    def connect(self, engines: list[Worker], layout: Layout) -> None:
        self._engines, self._rank = engines, layout.rank
        self._pool = ThreadPoolExecutor(len(engines), thread_name_prefix="weights")

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool) -> dict[str, float]:
        """Returns ``bytes`` and ``tensors``. What was loaded is compared by the engine itself; see ``end_update``.

        Raises TransportError naming the tensors and the engine; the group is given up then.
        """
        sent = tensors_sent = 0
        before: Sent | None = None
        try:
            for flat in buckets(tensors, self._flats):
                if not sent:
                    self._meet(flat.tensor.device.type)
                sent, tensors_sent = sent + flat.used, tensors_sent + len(flat.places)
                if before:  # one at a time: calls may overtake each other, and broadcasts must not
                    self._settle(before)
                before = self._post(flat)
            if before:
                self._settle(before)
        except BaseException:
            self._leave()
            raise
        return {"bytes": float(sent), "tensors": float(tensors_sent)}

    def close(self) -> None:
        """Leave the group and end the threads. May be called twice, and without ``connect``."""
        self._leave()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    # -- the group -----------------------------------------------------------------------------------------------

    def _ask(self, method: str, *args: Any) -> list[tuple[Worker, Future[Any]]]:
        if self._pool is None:
            raise TransportError("send before connect")
        return [(e, self._pool.submit(e.ask, method, *args, timeout=self._timeout)) for e in self._engines]

    def _meet(self, device: str) -> None:
        """Be in one group with every engine's server: this rank is 0, engine i begins at 1 + i * width."""
        if self._group is not None and all(there.result() for _, there in self._ask("member", self._name)):
            return
        self._leave()
        if self._pool is None:
            raise TransportError("send before connect")
        self._name = f"miles-{self._rank}-{next(self._numbers)}"
        host = own_address()
        port = free_port(host)
        world = 1 + len(self._engines) * self._width
        joins = [
            (
                e,
                self._pool.submit(
                    e.ask, "join", host, port, 1 + i * self._width, world, self._name, timeout=self._timeout
                ),
            )
            for i, e in enumerate(self._engines)
        ]
        try:
            self._group = _enter(f"tcp://{host}:{port}", device, world, self._name, self._timeout)
        except Exception as error:
            for engine, join in joins:
                if join.done() and (cause := join.exception()):
                    raise TransportError(f"{engine.name} did not join {self._name}: {cause}") from cause
            raise TransportError(f"rank {self._rank} did not meet the engines at {host}:{port}: {error}") from error
        for engine, join in joins:
            if cause := join.exception():
                raise TransportError(f"{engine.name} did not join {self._name}: {cause}") from cause

    def _leave(self) -> None:
        """Give the group up, without asking anybody: engines that still are in it may be gone."""
        group, self._group = self._group, None
        if group is not None:
            group.abort() if hasattr(group, "abort") else None

    # -- a bucket ------------------------------------------------------------------------------------------------

    def _post(self, flat: Flat) -> Sent:
        """Have every engine wait for a bucket, and send it; both go on behind this call."""
        bucket = wire.Broadcast(
            tuple(p.name for p in flat.places),
            tuple(str(p.dtype).removeprefix("torch.") for p in flat.places),
            tuple(tuple(p.shape) for p in flat.places),
            self._name,
            "flattened_bucket",
        )
        loads = self._ask("load", bucket)
        return Sent(flat.names, self._group.broadcast(flat.tensor, 0), loads)

    def _settle(self, sent: Sent) -> None:
        """Wait until every engine has loaded a bucket. Raises TransportError with the first fault.

        Engines answer when they have received, or could not; the broadcast itself might wait for ever for one that
        is gone.
        """
        wait([load for _, load in sent.loads], return_when=FIRST_EXCEPTION)
        for engine, load in sent.loads:
            if load.done() and (cause := load.exception()):
                raise TransportError(f"{engine.name} did not load {sent.names}: {cause}") from cause
        sent.work.wait()


def _enter(address: str, device: str, world: int, name: str, timeout_s: float) -> Any:
    """Rank 0 of a group outside the trainers' own, in the way SGLang enters it: same store, same keys."""
    from sglang.srt.utils import init_custom_process_group

    return init_custom_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        init_method=address,
        timeout=timedelta(seconds=timeout_s),
        world_size=world,
        rank=0,
        group_name=name,
    )
