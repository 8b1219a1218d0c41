"""Copies of tensors in host memory that is kept from one time to the next, for a thread to write behind training.

Bytes that several tensors show are copied once: in float32 on a CPU the optimizer's weights are the model's. Memory is
reserved ahead, because the first touch of a page costs several times the copy into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import device

ALIGN = 64  # bytes, of where a copy begins
GAP = 4096  # bytes between two tensors of one storage that are sooner copied than left out


@dataclass(slots=True)
class _Span:
    """Bytes of one storage that are copied in one piece, to ``at``."""

    source: Tensor  # any tensor of that storage
    start: int
    end: int
    at: int = 0

    def copy(self, memory: Tensor) -> None:
        storage, size = self.source.untyped_storage(), self.end - self.start
        whole = torch.empty(0, dtype=torch.uint8, device=self.source.device).set_(storage, self.start, (size,), (1,))
        memory[self.at : self.at + size].copy_(whole, non_blocking=True)


class Snapshot:
    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._unpin: Callable[[], Any] = lambda: None
        self._reserving: Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._sources: list[Tensor] = []

    def reserve(self, size: int) -> None:
        """Have ``size`` bytes ready by the first ``take``, in a thread."""
        self._reserving = Thread(target=self._grow, args=(size,), name="reserve", daemon=True)
        self._reserving.start()

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Equal tensors on the host, each with a storage of just its size. Those of the time before are overwritten.

        On a GPU the copies are whole after ``wait``, and the tensors must not change before ``settle``.
        """
        if self._reserving:
            self._reserving.join()
            self._reserving = None
        with device.native():  # thousands of calls
            tensors = [tensor.detach().contiguous() for tensor in tensors]
            starts = [int(tensor.storage_offset()) * tensor.itemsize for tensor in tensors]
            of = _spans(tensors, starts)
            spans, size = {id(span): span for span in of}.values(), 0
            for span in spans:
                span.at, size = size, size + -(-(span.end - span.start) // ALIGN) * ALIGN
            self._grow(size)
            self._copy(list(spans))
            places = [span.at + start - span.start for span, start in zip(of, starts, strict=True)]
            return [self._shown(tensor, at) for tensor, at in zip(tensors, places, strict=True)]

    def wait(self) -> None:
        """Until the copies are whole."""
        if self._copied:
            self._copied.synchronize()

    def settle(self) -> None:
        """Let what the GPU is given to do from here on change the tensors."""
        if self._copied:
            torch.cuda.current_stream().wait_event(self._copied)
        self._sources = []

    def _grow(self, size: int) -> None:
        if size <= self._memory.nbytes:
            return
        self._unpin()
        self._memory = np.empty(size, np.uint8)
        torch.from_numpy(self._memory).zero_()  # touches every page, and lets other threads run
        if device.has_gpu():
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(cuda.cudaHostRegister(self._memory.ctypes.data, size, 1)) == 0:  # else it is slower
                self._unpin = weakref.finalize(self, cuda.cudaHostUnregister, self._memory.ctypes.data)

    def _copy(self, spans: list[_Span]) -> None:
        memory = torch.from_numpy(self._memory)
        if not device.has_gpu():
            for span in spans:
                span.copy(memory)
            return
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for span in spans:
                span.copy(memory)
            self._copied = self._stream.record_event()
        self._sources = [span.source for span in spans]

    def _shown(self, tensor: Tensor, at: int) -> Tensor:
        """The copy of ``tensor``, ``at`` this byte. Not a view: where one is written, so is all of its storage."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = torch.frombuffer(self._memory.data, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        return flat.view(tensor.shape)


def _spans(tensors: list[Tensor], starts: list[int]) -> list[_Span]:
    """The span that holds each tensor, which begins at such a byte of its storage; as few as there can be."""
    storages: dict[tuple[torch.device, int], list[int]] = {}
    for i, tensor in enumerate(tensors):
        storages.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(i)
    found: dict[int, _Span] = {}
    for members in storages.values():
        span: _Span | None = None
        for i in sorted(members, key=starts.__getitem__):
            start, end = starts[i], starts[i] + tensors[i].nbytes
            if span is None or start > span.end + GAP:
                span = _Span(tensors[i], start, end)
            span.end = max(span.end, end)
            found[i] = span
    return [found[i] for i in range(len(tensors))]
