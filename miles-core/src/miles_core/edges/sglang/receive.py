"""Weights that come by broadcast, inside the server: SGLang calls ``receive`` as its ``custom_weight_loader``.

One call is all that one rank sends in an update. What is in the next bucket the sender writes down in a store that all
can read, so that no bucket waits for a request to pass from the network to the scheduler, and the model looks up its
parameters once an update. Nothing here waits for the GPU:

- A bucket is received on a stream of its own, into one of two buffers that stay as long as the group does, while the
  GPU still copies the bucket before it into the parameters.
- That is done by ``model.load_weights``, and later as that did it (see ``copies``), on the stream that SGLang calls
  this on. So everything that SGLang does later, of the next update's first bucket to the first token, comes behind it,
  whether or not a last bucket ever arrived.
- A buffer is received into again only behind the copies out of it; an event on that stream tells. It was allocated on
  that stream, which waits for every broadcast: whoever has its memory next comes behind both.

An exception here ends the scheduler (0.5.16 and 0.5.23 alike), and that the server. Its last lines say what was wrong,
and the engine puts them behind its complaint.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import chain, count, cycle
from math import prod
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .bucket import Place, names_of
from .copies import Copies, Watch


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

    buffer: Tensor | None = None
    loaded: torch.cuda.Event | None = None  # behind the last copy out of it
    given: list[tuple[str, Any]] = field(default_factory=list)  # names, and weak references to tensors in it

    def hold(self, size: int, device: torch.device) -> None:
        """Be ready to receive. Raises RuntimeError where what was given before is still wanted."""
        if kept := [name for name, tensor in self.given if tensor() is not None]:
            raise RuntimeError(f"the model keeps {kept[0]} while it asks for tensors behind it, and it is overwritten")
        self.given = []
        if self.buffer is None:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One that was received, or on a GPU will have been when the current stream comes to it."""

    note: bytes
    places: list[Place]
    flat: Tensor  # [bytes] uint8
    slot: Slot

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each by its name. It is gone once the bucket after the next one is asked for."""
        for place in self.places:
            tensor = self.flat[place.start : place.end].view(place.dtype).view(place.shape)
            self.slot.given.append((place.name, ref(tensor)))
            yield place.name, tensor


class Receiver:
    """One rank's end of one group."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before the copies, which would fill the GPU: a broadcast that cannot start keeps every other receiver waiting.
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]
        self._slots = Slot(), Slot()
        self._notes: TCPStore | None = None
        self._copies = Copies()
        self._at: tuple[int, list[Place]] | None = None

    @property
    def at(self) -> str:
        """What it was at, for a complaint."""
        return f"at bucket {self._at[0]}, {names_of(self._at[1])}" if self._at else "before the first bucket"

    def load(self, model: Any, group: dist.ProcessGroup, sending: Sending) -> None:
        """Load all that is sent. On a GPU it is only begun when this returns; see above. Raises RuntimeError."""
        arriving = self._arriving(group, sending)
        for number, bucket in enumerate(arriving):
            if not number:
                self._copies.check(model)
            if known := self._copies.known(bucket.note):
                known.take(bucket.flat)
            else:
                self._ask(model, chain([bucket], arriving))

    def _ask(self, model: Any, buckets: Iterator[Bucket]) -> None:
        """Have the model load what is in these."""
        with self._copies.watch(model) as watch:
            tensors = _tensors(buckets, watch)
            model.load_weights(tensors)
        if next(tensors, None) is not None:
            raise RuntimeError("the model asks for no more tensors, and there are more")

    def _arriving(self, group: dist.ProcessGroup, sending: Sending) -> Iterator[Bucket]:
        """Each is gone once the next but one is asked for."""
        limit, slots = timedelta(seconds=sending.timeout_s), cycle(self._slots)
        if self._notes is None:
            self._notes = TCPStore(sending.host, sending.port, is_master=False, timeout=limit, wait_for_workers=False)
        for number in count():
            note = self._notes.get(sending.key(number))
            known = self._copies.known(note)
            places = known.places if known else places_of(note)
            if not places:
                return
            self._at = number, places
            size = places[-1].end
            slot = Slot() if size > sending.bucket_bytes else next(slots)
            slot.hold(max(size, sending.bucket_bytes), self._device)
            yield Bucket(note, places, self._receive(group, slot, size), slot)
            if self._stream:
                slot.loaded = slot.loaded or torch.cuda.Event()  # type: ignore[no-untyped-call]
                slot.loaded.record()

    def _receive(self, group: dist.ProcessGroup, slot: Slot, size: int) -> Tensor:
        """[size] uint8 in the slot's buffer. Whatever the current stream does with it comes behind its arrival."""
        assert slot.buffer is not None
        flat = slot.buffer[:size]
        if self._stream is None:
            dist.broadcast(flat, group=group, group_src=0)
            return flat
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            if slot.loaded:
                self._stream.wait_event(slot.loaded)
            else:
                self._stream.wait_stream(here)  # for whoever had its memory before
            dist.broadcast(flat, group=group, group_src=0)
        here.wait_stream(self._stream)
        return flat


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


# By the group itself: what leaves it, or meets another one of that name, begins anew, and its buffers go with it.
_receivers: WeakKeyDictionary[dist.ProcessGroup, Receiver] = WeakKeyDictionary()


def receive(model: Any, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Load into ``model`` what a rank sends. SGLang imports this by its name and calls it for every update.

    ``named_tensors``: one that says what ``Sending`` does, where SGLang has its weights.
    """
    [(told, empty)] = named_tensors
    sending = Sending(**json.loads(told))
    group = _joined(sending.group)
    if (receiver := _receivers.get(group)) is None:
        receiver = _receivers[group] = Receiver(empty.device)
    try:
        receiver.load(model, group, sending)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"weights were not loaded, {receiver.at}, in group {sending.group}: {why}") from error


def _joined(name: str) -> dist.ProcessGroup:
    """The group that SGLang made by this name. It keeps it to itself; PyTorch's table of groups, in which SGLang's own
    function enters it, has both."""
    from torch.distributed.distributed_c10d import _world

    for group, called in _world.pg_names.items():
        if called == name:
            return group
    raise RuntimeError(f"weights were sent in group {name}, which this server is not in")
