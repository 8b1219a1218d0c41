"""Tensors laid end to end in one buffer, as SGLang calls a flattened bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor in a bucket: bytes ``start`` to ``end``."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int


BATCH = 64 << 20  # bytes that are copied by one call; until then what they are copied from stays


class Flat:
    """A buffer that is filled again and again; allocated with the first tensor, on that tensor's device.

    What is ``put`` is copied with others, at the latest by ``flush``: a call for each tensor would take as long as
    moving all of them. A name that comes to where it was the last time costs next to nothing.
    """

    def __init__(self, size: int) -> None:
        """``size`` in bytes. No larger tensor may be put into it; see ``Lone``."""
        self.size = size
        self._buffer: Tensor | None = None
        self._known: dict[str, tuple[Place, Tensor]] = {}  # where each tensor was the last time
        self._sources: list[Tensor] = []  # not copied yet
        self._targets: list[Tensor] = []
        self._waiting = 0  # bytes of these
        self.places: list[Place] = []
        self.used = 0

    def put(self, name: str, tensor: Tensor) -> bool:
        """False where it may not stand behind those that are there: no room, or a gap, and receivers leave none."""
        size, start = tensor.nbytes, self.used
        if self.places and (start + size > self.size or start % tensor.itemsize):
            return False
        if self._buffer is None:
            self._buffer = torch.empty(self.size, dtype=torch.uint8, device=tensor.device)
        place, target = self._known.get(name, (None, tensor))
        if place is None or (place.start, place.dtype, place.shape) != (start, tensor.dtype, tensor.shape):
            place = Place(name, tensor.dtype, tensor.shape, start, start + size)
            target = self._buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            self._known[name] = place, target
        self.places.append(place)
        self._sources.append(tensor)
        self._targets.append(target)
        self.used, self._waiting = start + size, self._waiting + size
        if self._waiting >= BATCH:
            self.flush()
        return True

    @torch.no_grad()
    def flush(self) -> None:
        """Copy what was put and is not copied yet."""
        if self._sources:
            torch._foreach_copy_(self._targets, self._sources)
        self._sources, self._targets, self._waiting = [], [], 0

    @property
    def tensor(self) -> Tensor:
        """[used] uint8: what is in it, no copy."""
        assert self._buffer is not None
        return self._buffer[: self.used]

    def clear(self) -> None:
        self.places, self.used = [], 0
        self._sources, self._targets, self._waiting = [], [], 0


class Lone:
    """A tensor larger than a bucket: it travels by itself, from where it lies, and is kept until it has arrived."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.whole = tensor.detach().contiguous()
        self.places = [Place(name, tensor.dtype, tensor.shape, 0, tensor.nbytes)]
        self.used = tensor.nbytes

    @property
    def tensor(self) -> Tensor:
        """[used] uint8, no copy."""
        return self.whole.view(-1).view(torch.uint8)


def names_of(places: list[Place]) -> str:
    """What is in a bucket, for a complaint."""
    first, last = places[0].name, places[-1].name
    return first if first == last else f"{first} ... {last} ({len(places)} tensors)"


def buckets(tensors: Iterator[tuple[str, Tensor]], flats: Sequence[Flat]) -> Iterator[Flat | Lone]:
    """The tensors in these buckets by turns, of one size. Each is yielded when it is full; of two, one is filled again
    behind the next yield, of three behind the one after that. What is larger than a bucket comes by itself."""
    for flat in flats:  # what an earlier call left in them is not to be sent again
        flat.clear()
    turns = cycle(flats)
    filling = next(turns)
    for name, tensor in tensors:
        alone = tensor.nbytes > filling.size
        if alone or not filling.put(name, tensor):
            if filling.places:
                filling.flush()
                yield filling
                filling = next(turns)
                filling.clear()
            if alone:
                yield Lone(name, tensor)
            else:
                filling.put(name, tensor)
    if filling.places:
        filling.flush()
        yield filling
