"""Weights to engines on other GPUs: one broadcast a bucket, to all of them at once; ``receive`` is the other end."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ...types import Layout
from ..protocols import TransportError, Worker
from . import wire
from .bucket import Flat, Lone, Place, buckets, names_of
from .process import free_port, own_address
from .proof import Proving
from .receive import OVER, Sending, note

AHEAD = 8  # buckets that the GPU was given and has not sent
UNWATCHED = "TORCH_NCCL_BLOCKING_WAIT"  # by which PyTorch makes groups that have no watchdog, and block who waits
LEAVE_S = 5.0  # for engines to leave a group
LOOK_S = 0.0002  # between two looks whether a broadcast is over that is waited for
LAST_S = 0.05  # and whether one is that nobody waits for
TAIL_S = 60.0  # for what is left of a send to be gone, once every GPU was told of all of it
PATIENCE = 0.8  # of the time limit: who has not answered when that is over is killed, and was perhaps not at fault

Answers = list[tuple[Worker, Future[Any]]]


@dataclass(slots=True)
class Sent:
    """A bucket on its way."""

    places: list[Place]
    tensor: Tensor | None  # until what comes next waits for it
    work: Any  # of the broadcast
    on_gpu: bool
    posted: float = field(default_factory=time.monotonic)


class BroadcastTransport:
    """Implements ``miles_core.types.Transport``. One process group a sender, so one a pipeline stage, with all engines.

    The group is made when the first tensor is to be sent, and anew when an engine is not in it any more. Engines are
    told once an update that buckets come, and read in a store here what is in each (see ``receive``). Broadcasts follow
    each other on the GPU, and nobody waits for a reply in between: a bucket is filled again as soon as it was sent, by
    the GPU's own clock. What a send takes is two buckets and, one at a time, a tensor that is larger.

    On a GPU a send is over once every engine has told its own GPU to receive and load all of it, and this rank's was
    told to send it: what either does next, such as a token or a step, comes behind that. So the ways from here to the
    engines and back, which take longer than a bucket, are gone while the last ones are still under way.
    """

    def __init__(self, width: int, bucket_bytes: int, timeout_s: float, every: int = 0) -> None:
        """``width``: tensor-parallel ranks of an engine. Who has not received by ``timeout_s`` is dead: a bucket that
        is on its way, or all of them. Whether all arrived is found out when that is asked for, and ``every`` so many
        updates."""
        self._width, self._bucket_bytes, self._timeout = width, bucket_bytes, timeout_s
        self._proving = Proving(every)
        self._flats = Flat(bucket_bytes), Flat(bucket_bytes)
        self._group: Any = None
        self._met = False  # whether anything was broadcast in it
        self._name = ""
        self._sending: Sending | None = None  # the last update
        self._notes: TCPStore | None = None  # what is in buckets
        self._written: list[str] = []  # notes of the update under way
        self._engines: list[Worker] = []
        self._servers: list[str] = []  # of these, that were told to enter the group
        self._loads: Answers = []  # of the update under way
        self._last: Sent | None = None  # of the update before: nobody waited until it was sent
        self._leaving = threading.RLock()  # of whoever looks how that one ended, or gives the group up
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, engines: list[Worker], layout: Layout) -> None:
        self._engines, self._layout = engines, layout
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_turn, args=(self._loop,), name="weights", daemon=True).start()

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool, servers: list[str]) -> dict[str, float]:
        """Returns ``bytes`` and ``tensors``. The group is made anew where ``servers`` are others than those in it. With
        ``verify`` the engines find out whether all arrived; see ``proof``.

        Raises TransportError naming the tensors and the engine; the group is given up then.
        """
        self._finish()
        sent = tensors_sent = 0
        under_way: deque[Sent] = deque()
        before: Sent | None = None
        sending: Sending | None = None
        turn, prove = False, self._proving.now(verify)
        try:
            for number, bucket in enumerate(buckets(tensors, self._flats)):
                if sending is None:
                    turn = self._take_turn()
                    self._meet(bucket.tensor.device.type, servers)
                    sending = self._announce(prove)
                sent, tensors_sent = sent + bucket.used, tensors_sent + len(bucket.places)
                under_way.append(self._post(bucket, sending.key(number)))
                if before:  # what held it is filled next
                    self._pass(before)
                before = under_way[-1]
                while len(under_way) > AHEAD:
                    self._arrive(under_way.popleft())
            if sending:
                self._write(sending.key(len(self._written)), [])
                self._settle(under_way, turn)
        except BaseException:
            self._leave()
            raise
        finally:
            self._forget()
            if turn:
                self._end_turn()
        return {"bytes": float(sent), "tensors": float(tensors_sent)}

    def close(self) -> None:
        """Leave the group, as the engines do that still are in it, and end the thread. May be called twice, and
        without ``connect``."""
        self._finish(LEAVE_S)
        if self._servers:  # also where the group was given up: a server may be in it yet
            self._dismiss(self._engines)  # first: of an update just now the network may still have the end to send
            self._leave()
        self._servers, self._notes = [], None
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
        """Two ranks that broadcast to two GPUs at once might each find one of them waiting for the other rank."""
        if self._loop is None or self._layout.world == 1 or len(self._engines) * self._width == 1:
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

    def _meet(self, device: str, servers: list[str]) -> None:
        """Be in one group with every engine's server: this rank is 0, engine i begins at 1 + i * width."""
        if self._group is not None and servers == self._servers:
            return
        self._leave()
        self._dismiss([e for e, was, now in zip(self._engines, self._servers, servers, strict=False) if was == now])
        self._servers = servers
        self._name = f"miles-{self._layout.rank}-{secrets.token_hex(4)}"  # both ends refuse one that they had
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
        self._met = False
        for engine, join in joins:
            if cause := join.exception():
                raise TransportError(f"{engine.name} did not join {self._name}: {cause}") from cause

    def _leave(self) -> None:
        """Give the group up, without asking anybody: engines that still are in it may be gone."""
        with self._leaving:
            group, notes, self._group = self._group, self._notes, None
            try:
                if group is not None and hasattr(group, "abort"):
                    group.abort()
            except RuntimeError as error:
                print(f"{self._name} is given up, but was not ended: {error}", flush=True)
            finally:
                self._last = None
        if notes and (last := self._sending):  # whichever of these is waited for
            for key in last.key(len(self._written)), replace(last, number=last.number + 1).key(0):
                notes.set(key, OVER)

    def _dismiss(self, engines: list[Worker]) -> None:
        """Have engines leave the group, whose memory they would keep. One that cannot is no fault of an update."""
        wait([self._ask(engine, "leave", self._name) for engine in engines], LEAVE_S)

    # -- what is sent --------------------------------------------------------------------------------------------

    def _announce(self, prove: bool) -> Sending:
        """Have every engine receive buckets, as they come, until there are no more."""
        if prove:
            for asked in [self._ask(engine, "prove") for engine in self._engines]:
                asked.result()
        host = own_address()
        if self._notes is None:
            limit = timedelta(seconds=self._timeout)
            self._notes = TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        number = self._sending.number + 1 if self._sending else 1
        sending = Sending(self._name, host, self._notes.port, number, self._bucket_bytes, self._timeout)
        self._sending = sending
        told = wire.Tensors((sending.payload(),) * self._width, wire.RECEIVE)
        self._loads = [(engine, self._ask(engine, "load", told)) for engine in self._engines]
        return sending

    def _write(self, key: str, places: list[Place]) -> None:
        """A note of what is in the next bucket."""
        assert self._notes is not None
        self._notes.set(key, note(places))
        self._written.append(key)

    def _forget(self) -> None:
        """Drop the notes, behind the caller's back: by now everybody has read them, or will never."""
        notes, written, self._written, self._loads = self._notes, self._written, [], []
        if notes and self._loop:
            self._loop.call_soon_threadsafe(lambda: [notes.delete_key(key) for key in written])

    def _post(self, bucket: Flat | Lone, key: str) -> Sent:
        """Say what is in a bucket, and send it; both go on behind this call."""
        self._write(key, bucket.places)
        tensor = bucket.tensor
        with self._sent(bucket.places):
            work = self._group.broadcast(tensor, 0) if self._met else self._first(bucket.places, tensor)
        return Sent(bucket.places, tensor, work, tensor.is_cuda)

    def _first(self, places: list[Place], tensor: Tensor) -> Any:
        """The first broadcast in a group. On GPUs its ranks meet in it, and NCCL waits for all of them without a limit:
        so another thread does, which nobody waits for where an engine fails before it is there."""
        begun: Future[Any] = Future()
        group, stream = self._group, torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None

        def begin() -> None:
            try:
                with torch.cuda.stream(stream):
                    begun.set_result(group.broadcast(tensor, 0))
            except Exception as error:
                begun.set_exception(error)

        threading.Thread(target=begin, name="weights", daemon=True).start()
        self._until(begun.done, places, time.monotonic())
        work = begun.result()
        self._met = True
        return work

    def _pass(self, sent: Sent) -> None:
        """Have what comes next wait until a bucket was sent: the GPU, not this thread, but where there is none."""
        if sent.on_gpu:
            with self._sent(sent.places):
                sent.work.block_current_stream()
        else:
            self._arrive(sent)
        sent.tensor = None

    def _settle(self, under_way: deque[Sent], turn: bool) -> None:
        """Wait until every engine has said that its GPU will load what was sent. All of it has been only where there
        is no GPU, and where another rank has its ``turn`` next."""
        wait([load for _, load in self._loads], return_when=FIRST_EXCEPTION)
        self._check(under_way[0].places)
        if turn or not under_way[0].on_gpu:
            for each in under_way:
                self._arrive(each)
        elif self._loop:
            self._last = under_way[-1]
            self._pass(self._last)
            asyncio.run_coroutine_threadsafe(self._watch(self._last), self._loop)

    def _finish(self, patience_s: float = math.inf) -> None:
        """Wait until the last update was sent or given up; mostly that is a step ago."""
        deadline = time.monotonic() + patience_s
        while (last := self._last) and not last.work.is_completed():
            if time.monotonic() > deadline:
                return
            time.sleep(LOOK_S)
        if last:
            self._conclude(last)

    async def _watch(self, last: Sent) -> None:
        """Give the group up where an engine that had said so is gone: this rank's GPU would wait for it for ever."""
        limit = min(time.monotonic() + TAIL_S, self._limit(last.posted))
        while self._last is last and not last.work.is_completed():
            if time.monotonic() > limit:
                return self._conclude(last, "hangs")
            await asyncio.sleep(LAST_S)
        self._conclude(last)

    def _conclude(self, last: Sent, fault: str = "") -> None:
        """Give the group up if there is a fault. Who comes second has nothing to do."""
        with self._leaving:
            if self._last is not last:
                return
            try:
                if not fault:
                    last.work.wait()  # raises what NCCL knows, which is something where a network was in between
            except RuntimeError as error:
                fault = f"failed ({str(error).partition('\n')[0]})"
            if fault:
                print(f"{names_of(last.places)}: their broadcast {fault}, and is given up", flush=True)
                self._leave()
            self._last = None

    def _arrive(self, sent: Sent) -> None:
        """Wait until a bucket was sent, and so all before it. Raises TransportError."""
        self._until(sent.work.is_completed, sent.places, sent.posted)
        with self._sent(sent.places):
            sent.work.wait()  # raises what went wrong with it

    def _until(self, over: Callable[[], bool], places: list[Place], began: float) -> None:
        """Wait for what needs every engine. Raises TransportError, with an engine's fault if there is one: it might
        never be over without one that is gone."""
        while not over():
            self._check(places)
            if time.monotonic() > self._limit(began):
                raise TransportError(f"{names_of(places)}: their broadcast hangs, and no engine says why")
            time.sleep(LOOK_S)

    def _limit(self, began: float) -> float:
        return began + PATIENCE * self._timeout

    @contextmanager
    def _sent(self, places: list[Place]) -> Iterator[None]:
        """Has a broadcast that fails raise TransportError, with the fault of an engine that is gone if it is known in a
        moment."""
        try:
            yield
        except RuntimeError as error:
            wait([load for _, load in self._loads], LEAVE_S, FIRST_EXCEPTION)
            self._check(places)
            raise TransportError(f"{names_of(places)} were not sent: {error}") from error

    def _check(self, places: list[Place]) -> None:
        """Raises TransportError with the first fault of an engine, found while these were on their way."""
        for engine, load in self._loads:
            if load.done() and (cause := load.exception()):
                raise TransportError(f"{engine.name} did not load {names_of(places)}: {cause}") from cause


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # ends what is left behind
        runner.get_loop().run_forever()


def _enter(address: str, device: str, world: int, name: str, timeout_s: float) -> Any:
    """Rank 0 of a group outside the trainers' own, in the way SGLang enters it: same store, same keys."""
    from sglang.srt.utils import init_custom_process_group

    with _unwatched():
        return init_custom_process_group(
            backend="nccl" if device == "cuda" else "gloo",
            init_method=address,
            timeout=timedelta(seconds=timeout_s),
            world_size=world,
            rank=0,
            group_name=name,
        )


@contextmanager
def _unwatched() -> Iterator[None]:
    """A group of NCCL's that is made in here has no watchdog of PyTorch's. That would end this process, a minute after
    an engine behind a network is gone, and long after the group was given up. What it looks for, the engine says."""
    before = os.environ.get(UNWATCHED)
    os.environ[UNWATCHED] = "1"
    try:
        yield
    finally:
        os.environ.pop(UNWATCHED, None)
        if before is not None:
            os.environ[UNWATCHED] = before
