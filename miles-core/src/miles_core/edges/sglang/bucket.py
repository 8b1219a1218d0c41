"""Tensors laid end to end in one buffer, as SGLang calls a flattened bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


class Flat:
    """A buffer that is filled again and again; allocated with the first tensor, on that tensor's device."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes; a tensor larger than it makes the buffer as large as itself, for good."""
        self._size = size
        self._buffer: Tensor | None = None
        self.places: list[Place] = []
        self.used = 0

    def fits(self, tensor: Tensor) -> bool:
        """Whether it may stand behind those that are there, without a gap: receivers leave none."""
        return not self.places or (self.used + tensor.nbytes <= self._size and self.used % tensor.itemsize == 0)

    def put(self, name: str, tensor: Tensor) -> None:
        if self._buffer is None or tensor.nbytes > len(self._buffer):
            self._buffer = None  # the old one first
            self._buffer = torch.empty(max(self._size, tensor.nbytes), dtype=torch.uint8, device=tensor.device)
        end = self.used + tensor.nbytes
        self._buffer[self.used : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.places.append(Place(name, tensor.dtype, tensor.shape, self.used, end))
        self.used = end

    @property
    def tensor(self) -> Tensor:
        """[used] uint8: what is in it, no copy."""
        assert self._buffer is not None
        return self._buffer[: self.used]

    @property
    def names(self) -> str:
        """What is in it, for a complaint."""
        first, last = self.places[0].name, self.places[-1].name
        return first if first == last else f"{first} ... {last} ({len(self.places)} tensors)"

    def clear(self) -> None:
        self.places, self.used = [], 0


def buckets(tensors: Iterator[tuple[str, Tensor]], flats: tuple[Flat, Flat]) -> Iterator[Flat]:
    """The tensors in the two buckets by turns; each is yielded when it is full, and filled again two yields later."""
    current = 0
    for flat in flats:  # what an earlier call left in them is not to be sent again
        flat.clear()
    for name, tensor in tensors:
        if not flats[current].fits(tensor):
            yield flats[current]
            current = 1 - current
            flats[current].clear()
        flats[current].put(name, tensor)
    if flats[current].places:
        yield flats[current]
