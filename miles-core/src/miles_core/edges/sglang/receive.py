"""Weights that come by broadcast, inside the server: SGLang calls ``receive`` as its ``custom_weight_loader``.

One call is all that one rank sends in an update. What is in the next bucket the sender writes down in a store that all
can read, so that no bucket waits for a request to pass from the network to the scheduler, and the model looks up its
parameters once an update. Nothing here waits for the GPU, and the first buckets not for the call either:

- A thread of the group's own reads the store. It has each bucket received on a stream of its own, into one of two
  buffers that stay as long as the group does, while the GPU still copies the bucket before it into the parameters.
  So what a rank sends is on its way while the call is on its own: through a client, the server and its scheduler.
- That copying is done by ``model.load_weights``, and later as that did it (see ``copies``), within the call and on the
  stream that SGLang makes it on. So everything that SGLang does later, of the next update's first bucket to the first
  token, comes behind it, whether or not a last bucket ever arrived.
- A buffer is received into again only behind the copies out of it; an event on that stream tells.

An exception here ends the scheduler (0.5.16 and 0.5.23 alike), and that the server. Its last lines say what was wrong,
and the engine puts them behind its complaint. What goes wrong in the thread is raised by the call.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import count
from math import prod
from queue import Empty as Nothing
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .bucket import Place, names_of
from .copies import Copies, Watch

SWITCH_S = 1e-4  # after which a thread gives Python's lock to one that waits for it
SLOTS = 2  # buffers: one is received into while the other is copied out of
OVER = ""  # a note by which nothing is sent in its group any more
LOOK = timedelta(hours=1)  # for a sender that left a group to have said so: PyTorch complains about every wait in vain


class Empty:
    """Is opened as a tensor of no elements. SGLang opens known names only, and that is the one in it; a tensor would
    bring those of whatever reduces tensors in its process, such as Megatron's."""

    def __reduce__(self) -> tuple[type[Tensor], tuple[()]]:
        return Tensor, ()


@dataclass(frozen=True, slots=True)
class Sending:
    """What a server is told of all that one rank sends in an update."""

    group: str  # that it was told to join; this rank is its first
    host: str  # where the sender's store is
    port: int
    number: int  # of the update, by which its notes are called
    bucket_bytes: int  # a tensor that is larger comes by itself
    timeout_s: float  # to wait for a note

    def payload(self) -> str:
        """As SGLang's ``MultiprocessingSerializer`` would give it: one named tensor, with all of this for its name, and
        empty, so that neither handle nor file goes with it and it may go to another machine."""
        return base64.b64encode(pickle.dumps([(json.dumps(asdict(self)), Empty())])).decode()

    def key(self, bucket: int) -> str:
        """What the note of a bucket is called."""
        return f"{self.group}/{self.number}/{bucket}"


def note(places: list[Place]) -> str:
    """What is in a bucket, end to end; no places: no bucket comes any more."""
    return json.dumps([(p.name, str(p.dtype).removeprefix("torch."), list(p.shape)) for p in places])


def places_of(note: bytes) -> list[Place]:
    """What ``note`` was made of."""
    places: list[Place] = []
    for name, kind, shape in json.loads(note):
        dtype, start = getattr(torch, kind), places[-1].end if places else 0
        places.append(Place(name, dtype, torch.Size(shape), start, start + dtype.itemsize * prod(shape)))
    return places


@dataclass(eq=False, slots=True)
class Slot:
    """A buffer, and what was made of it."""

    buffer: Tensor | None = None  # [bucket_bytes] uint8
    large: Tensor | None = None  # [bytes] uint8, in its place for a tensor that is larger
    loaded: torch.cuda.Event | None = None  # behind the last copy out of it
    given: list[tuple[str, Any]] = field(default_factory=list)  # names, and weak references to tensors in it

    def holds(self, size: int) -> Tensor:
        """[size] uint8: what is received into it."""
        buffer = self.buffer if self.large is None else self.large
        assert buffer is not None
        return buffer[:size]

    def take_back(self) -> None:
        """Raises RuntimeError where what was given is still wanted."""
        if kept := [name for name, tensor in self.given if tensor() is not None]:
            raise RuntimeError(f"the model keeps {kept[0]} while it asks for tensors behind it, and it is overwritten")
        self.given = []


@dataclass(frozen=True, slots=True)
class Bucket:
    """One that was received, or on a GPU will have been behind ``arrived``."""

    update: int
    number: int  # in that update
    note: bytes
    places: list[Place]  # none: it stands for the end of what is sent
    slot: Slot
    arrived: torch.cuda.Event | None

    @property
    def flat(self) -> Tensor:
        """[bytes] uint8; until it is given back."""
        return self.slot.holds(self.places[-1].end)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each by its name. It is gone once the bucket after the next one is asked for."""
        flat = self.flat
        for place in self.places:
            tensor = flat[place.start : place.end].view(place.dtype).view(place.shape)
            self.slot.given.append((place.name, ref(tensor)))
            yield place.name, tensor


class Receiver:
    """One rank's end of one group."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before the copies, which would fill the GPU: a broadcast that cannot start keeps every other receiver waiting.
        cuda = device.type == "cuda"
        self._stream = _stream(device) if cuda else None
        if self._stream:  # buffers are of this stream: whoever had their memory before was told so by now
            self._stream.wait_stream(torch.cuda.current_stream(device))
            finalize(self, _streams.append, self._stream)
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._arrived: SimpleQueue[Bucket | str] = SimpleQueue()
        self._copies = Copies()
        self._at = ""
        for _ in range(SLOTS):
            self._free.put(Slot())

    @property
    def at(self) -> str:
        """What it was at, for a complaint."""
        return self._at or "before the first bucket"

    # -- in the call ---------------------------------------------------------------------------------------------

    def load(self, model: Any, sending: Sending) -> None:
        """Load all that is sent. On a GPU it is only begun when this returns; see above. Raises RuntimeError."""
        self._at = ""
        self._copies.check(model)
        while bucket := self._next(sending):
            if known := self._copies.known(bucket.note):
                known.take(bucket.flat)
                self._give_back(bucket)
            else:
                return self._ask(model, bucket, sending)

    def _ask(self, model: Any, bucket: Bucket, sending: Sending) -> None:
        """Have the model load what is in this one, and in all behind it."""
        held: list[Bucket] = []
        with self._copies.watch(model) as watch:
            tensors = _tensors(self._from(bucket, sending, held), watch)
            model.load_weights(tensors)
        if next(tensors, None) is not None:
            raise RuntimeError("the model asks for no more tensors, and there are more")
        for each in held:
            self._give_back(each)

    def _from(self, bucket: Bucket | None, sending: Sending, held: list[Bucket]) -> Iterator[Bucket]:
        """This one, and all behind it. Each is ``held`` until the next but one is asked for: whoever asks for the next
        has the last tensor of this one at hand, perhaps to be copied yet."""
        while bucket:
            held.append(bucket)
            yield bucket
            if len(held) > 1:
                self._give_back(held.pop(0))
            bucket = self._next(sending)

    def _next(self, sending: Sending) -> Bucket | None:
        """The next one, once it is received, on a GPU by the time the current stream comes to it; None at the end."""
        try:
            bucket = self._arrived.get(timeout=sending.timeout_s)
        except Nothing:
            raise RuntimeError(f"the next bucket was not sent within {sending.timeout_s:g} s") from None
        if isinstance(bucket, str):
            raise RuntimeError(bucket)
        if bucket.update != sending.number:
            raise RuntimeError(f"it is of update {bucket.update}, and update {sending.number} was to be loaded")
        if not bucket.places:
            return None
        self._at = f"at bucket {bucket.number}, {names_of(bucket.places)}"
        if bucket.arrived:
            torch.cuda.current_stream(self._device).wait_event(bucket.arrived)
        return bucket

    def _give_back(self, bucket: Bucket) -> None:
        """Have its buffer received into again, behind all that the current stream was told."""
        bucket.slot.take_back()
        if bucket.arrived:
            bucket.slot.loaded = bucket.slot.loaded or torch.cuda.Event()  # type: ignore[no-untyped-call]
            bucket.slot.loaded.record()
        self._free.put(bucket.slot)

    # -- in the thread -------------------------------------------------------------------------------------------

    def take(self, group: dist.ProcessGroup, sending: Sending, number: int, note: bytes) -> bool:
        """Receive the bucket of which this is the note. False at the end of what is sent in the update."""
        known = self._copies.known(note)
        places = known.places if known else places_of(note)
        if not places:
            self._arrived.put(Bucket(sending.number, number, note, places, Slot(), None))
            for slot in [self._slot(sending) for _ in range(SLOTS)]:  # what is large in them goes now
                self._free.put(slot)
            return False
        slot, size = self._slot(sending), places[-1].end
        if size > sending.bucket_bytes:
            slot.large = self._new(size)
        elif slot.buffer is None:
            slot.buffer = self._new(sending.bucket_bytes)
        arrived = self._receive(group, slot.holds(size))
        self._arrived.put(Bucket(sending.number, number, note, places, slot, arrived))
        return True

    def _slot(self, sending: Sending) -> Slot:
        """One that may be received into: what the stream is told next comes behind the copies out of it."""
        try:
            slot = self._free.get(timeout=sending.timeout_s)
        except Nothing:
            raise RuntimeError(f"of what was received nothing was loaded within {sending.timeout_s:g} s") from None
        if self._stream and slot.loaded:
            self._stream.wait_event(slot.loaded)
        slot.large = None  # its memory is the stream's again
        return slot

    def _new(self, size: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _receive(self, group: dist.ProcessGroup, flat: Tensor) -> torch.cuda.Event | None:
        """Fill ``flat``; on a GPU that is done behind what is returned."""
        if self._stream is None:
            dist.broadcast(flat, group=group, group_src=0)
            return None
        with torch.cuda.stream(self._stream):
            dist.broadcast(flat, group=group, group_src=0)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return arrived

    def fail(self, why: str) -> None:
        """In words: the frames of an exception would keep the group, and that this."""
        self._arrived.put(why)


def _tensors(buckets: Iterator[Bucket], watch: Watch | None) -> Iterator[tuple[str, Tensor]]:
    """Those in all of the buckets."""
    while True:
        with watch.aside() if watch else nullcontext():
            bucket = next(buckets, None)
        if bucket is None:
            return
        if watch:
            watch.begin(bucket.note, bucket.places, bucket.flat)
        yield from bucket.tensors()


_streams: list[torch.cuda.Stream] = []  # of receivers that are gone


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One that nobody receives on. Memory stays with the stream that it was first taken for, so what earlier receivers
    left is found again on theirs; but not where a broadcast never came."""
    for stream in _streams:
        if stream.query():
            _streams.remove(stream)
            return stream
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


# By the group itself: what leaves it, or meets another one of that name, begins anew, and its buffers go with it.
_receivers: WeakKeyDictionary[dist.ProcessGroup, Receiver] = WeakKeyDictionary()


def receive(model: Any, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Load into ``model`` what a rank sends. SGLang imports this by its name and calls it for every update.

    ``named_tensors``: one that says what ``Sending`` does, where SGLang has its weights.
    """
    [(told, empty)] = named_tensors
    sending = Sending(**json.loads(told))
    receiver = receiver_of(_joined(sending.group), sending, empty.device)
    try:
        receiver.load(model, sending)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"weights were not loaded, {receiver.at}, in group {sending.group}: {why}") from error


def receiver_of(group: dist.ProcessGroup, sending: Sending, device: torch.device) -> Receiver:
    """The one that a group has; it begins with this update."""
    if (receiver := _receivers.get(group)) is None:
        # The scheduler looks for requests without a pause, and would keep Python's lock to itself for 5 ms at a time.
        sys.setswitchinterval(SWITCH_S)
        receiver = _receivers[group] = Receiver(device)
        known = ref(receiver), ref(group), sending, device
        threading.Thread(target=_ahead, args=known, name="weights", daemon=True).start()
    return receiver


def _ahead(receiver: ref[Receiver], group: ref[dist.ProcessGroup], sending: Sending, device: torch.device) -> None:
    """Have every bucket received that is sent in the group, of this update and all behind it. Ends with the group."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has one of its own
        limit = timedelta(seconds=sending.timeout_s)
        notes = TCPStore(sending.host, sending.port, is_master=False, timeout=limit, wait_for_workers=False)
        for update in count(sending.number):
            sending = replace(sending, number=update)
            for number in count():
                key = sending.key(number)
                while not _is_there(notes, key):
                    if receiver() is None:
                        return
                here, joined = receiver(), group()
                if here is None or joined is None:
                    return
                if not (note := notes.get(key)):
                    return here.fail("its rank left the group")
                goes_on = here.take(joined, sending, number, note)
                del here, joined  # or they stay as long as nothing is sent
                if not goes_on:
                    break
    except Exception as error:
        if here := receiver():
            here.fail(f"{type(error).__name__}: {error}")


def _is_there(notes: TCPStore, key: str) -> bool:
    """Waits a moment for it."""
    try:
        notes.wait([key], LOOK)
    except dist.DistStoreError:
        return False
    return True


def _joined(name: str) -> dist.ProcessGroup:
    """The group that SGLang made by this name. It keeps it to itself; PyTorch's table of groups, in which SGLang's own
    function enters it, has both."""
    from torch.distributed.distributed_c10d import _world

    for group, called in _world.pg_names.items():
        if called == name:
            return group
    raise RuntimeError(f"weights were sent in group {name}, which this server is not in")
