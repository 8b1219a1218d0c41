"""Weights to engines on other GPUs: one broadcast a bucket, to all of them at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from torch import Tensor

from ...types import Layout
from ..protocols import TransportError, Worker
from . import wire
from .bucket import Flat, Lone, Place, buckets, names_of
from .process import free_port, own_address

AHEAD = 8  # buckets that engines were told of and have not loaded
LOOK_S = 0.0002  # between two looks whether the last broadcast is over

Answers = list[tuple[Worker, Future[Any]]]


@dataclass(slots=True)
class Sent:
    """A bucket on its way."""

    places: list[Place]
    tensor: Tensor  # stays until it was sent
    work: Any  # of the broadcast
    loads: Answers


class BroadcastTransport:
    """Implements ``miles_core.types.Transport``. One process group a sender, so one a pipeline stage, with all engines.

    The group is made when the first tensor is to be sent, and anew when an engine is not in it any more. Engines are
    told of buckets ahead of time and take them in this order (see ``line``), broadcasts follow each other on the GPU,
    and nobody waits for a reply in between: a bucket is filled again as soon as it was sent, by the GPU's own clock.
    """

    def __init__(self, width: int, bucket_bytes: int, timeout_s: float) -> None:
        """``width``: tensor-parallel ranks of an engine. Who has not received a bucket by ``timeout_s`` is dead."""
        self._width, self._timeout = width, timeout_s
        self._flats = Flat(bucket_bytes), Flat(bucket_bytes)
        self._group: Any = None
        self._name = ""
        self._numbers = count(1)
        self._engines: list[Worker] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, engines: list[Worker], layout: Layout) -> None:
        self._engines, self._layout = engines, layout
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_turn, args=(self._loop,), name="weights", daemon=True).start()

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool) -> dict[str, float]:
        """Returns ``bytes`` and ``tensors``. What was loaded is compared by the engine itself; see ``end_update``.

        Raises TransportError naming the tensors and the engine; the group is given up then.
        """
        sent = tensors_sent = 0
        under_way: deque[Sent] = deque()
        before: Sent | None = None
        turn = False
        members = self._members()  # they answer while the first bucket is filled
        try:
            for bucket in buckets(tensors, self._flats):
                if not sent:
                    turn = self._take_turn()
                    self._meet(bucket.tensor.device.type, members)
                sent, tensors_sent = sent + bucket.used, tensors_sent + len(bucket.places)
                under_way.append(self._post(bucket))
                if before:  # what held it is filled next
                    self._pass(before)
                before = under_way[-1]
                while len(under_way) > AHEAD:
                    self._settle(under_way.popleft())
            for each in under_way:
                self._settle(each)
            if before:
                self._arrive(before)
        except BaseException:
            self._leave()
            raise
        finally:
            if turn:
                self._end_turn()
        return {"bytes": float(sent), "tensors": float(tensors_sent)}

    def close(self) -> None:
        """Leave the group and end the thread. May be called twice, and without ``connect``."""
        self._leave()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    # -- the engines ---------------------------------------------------------------------------------------------

    def _ask(self, engine: Worker, method: str, *args: Any) -> Future[Any]:
        """What is asked of an engine is begun there in the order it is asked."""
        if self._loop is None:
            raise TransportError("send before connect")
        return asyncio.run_coroutine_threadsafe(engine.call(method, *args, timeout=self._timeout), self._loop)

    def _take_turn(self) -> bool:
        """Two ranks that broadcast to two engines at once would each find one engine waiting for the other rank."""
        if self._loop is None or self._layout.world == 1 or len(self._engines) == 1:
            return False
        first = self._engines[0]
        try:
            self._ask(first, "take_turn").result()
        except Exception as error:
            raise TransportError(f"{first.name} gave rank {self._layout.rank} no turn to send: {error}") from error
        return True

    def _end_turn(self) -> None:
        with suppress(Exception):  # an engine that is gone has no turns; what went wrong is being raised
            self._ask(self._engines[0], "end_turn").result()

    # -- the group -----------------------------------------------------------------------------------------------

    def _members(self) -> Answers:
        """Whether each engine is in the group that there is, if there is one."""
        return [(e, self._ask(e, "member", self._name)) for e in self._engines] if self._group is not None else []

    def _meet(self, device: str, members: Answers) -> None:
        """Be in one group with every engine's server: this rank is 0, engine i begins at 1 + i * width."""
        if members and all(there.result() for _, there in members):
            return
        self._leave()
        for engine, _ in [(engine, there) for engine, there in members if there.result()]:
            with suppress(Exception):  # it would keep the group's memory, no more
                self._ask(engine, "leave", self._name).result()
        self._name = f"miles-{self._layout.rank}-{next(self._numbers)}"
        host = own_address()
        port = free_port(host)
        world = 1 + len(self._engines) * self._width
        joins = [
            (e, self._ask(e, "join", host, port, 1 + i * self._width, world, self._name))
            for i, e in enumerate(self._engines)
        ]
        try:
            self._group = _enter(f"tcp://{host}:{port}", device, world, self._name, self._timeout)
        except Exception as error:
            for engine, join in joins:
                if join.done() and (cause := join.exception()):
                    raise TransportError(f"{engine.name} did not join {self._name}: {cause}") from cause
            where = f"rank {self._layout.rank} did not meet the engines at {host}:{port}"
            raise TransportError(f"{where}: {error}") from error
        for engine, join in joins:
            if cause := join.exception():
                raise TransportError(f"{engine.name} did not join {self._name}: {cause}") from cause

    def _leave(self) -> None:
        """Give the group up, without asking anybody: engines that still are in it may be gone."""
        group, self._group = self._group, None
        if group is not None:
            group.abort() if hasattr(group, "abort") else None

    # -- a bucket ------------------------------------------------------------------------------------------------

    def _post(self, bucket: Flat | Lone) -> Sent:
        """Have every engine wait for a bucket, and send it; both go on behind this call."""
        lone = isinstance(bucket, Lone)  # and is received as it is, where a flat bucket would be laid out there first
        told = wire.Broadcast(
            tuple(p.name for p in bucket.places),
            tuple(str(p.dtype).removeprefix("torch.") for p in bucket.places),
            tuple(tuple(p.shape) for p in bucket.places),
            self._name,
            "" if lone else "flattened_bucket",
        )
        loads = [(engine, self._ask(engine, "load", told)) for engine in self._engines]
        tensor = bucket.whole if isinstance(bucket, Lone) else bucket.tensor
        return Sent(bucket.places, tensor, self._group.broadcast(tensor, 0), loads)

    def _pass(self, sent: Sent) -> None:
        """Have what comes next wait until a bucket was sent: the GPU, not this thread, but where there is none."""
        if not sent.tensor.is_cuda:
            self._settle(sent)
        sent.work.wait()

    def _settle(self, sent: Sent) -> None:
        """Wait until every engine has loaded a bucket. Raises TransportError with the first fault.

        Engines answer when they have received, or could not; the broadcast itself might wait for ever for one that
        is gone.
        """
        wait([load for _, load in sent.loads], return_when=FIRST_EXCEPTION)
        for engine, load in sent.loads:
            if load.done() and (cause := load.exception()):
                raise TransportError(f"{engine.name} did not load {names_of(sent.places)}: {cause}") from cause

    def _arrive(self, sent: Sent) -> None:
        """Wait until a bucket was sent, and so all before it. Engines answer as soon as their GPU will receive it."""
        deadline = time.monotonic() + self._timeout
        while not sent.work.is_completed():
            if time.monotonic() > deadline:
                names = names_of(sent.places)
                raise TransportError(f"{names}: every engine said that it loaded them, but their broadcast hangs")
            time.sleep(LOOK_S)
        sent.work.wait()  # raises what went wrong with it


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


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
