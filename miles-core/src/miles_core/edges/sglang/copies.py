"""What a model does with a bucket of weights, where that comes to copies: seen once, and done without asking it again.

``model.load_weights`` is Python for each tensor, in which it looks for the parameter that the tensor is a part of, and
takes longer than the tensors do to arrive. Yet of a bucket with the same tensors in it the same bytes go the same way.

A bucket becomes known only where nothing else is possible: while the model loaded all of them, PyTorch did nothing but
take views, copy parts of the bucket into parameters, some of each tensor and nothing to where something was copied
before, and fill parts of parameters with numbers (the padding of a vocabulary). One operation of another kind, on
whatever tensor, and the model is always asked. So it is once a parameter is not where it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bucket import Place

_COPY, _FILLS = torch.ops.aten.copy_.default, (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


@dataclass(frozen=True, slots=True)
class Part:
    """Of a bucket: a view of its memory."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements of that dtype

    def within(self, flat: Tensor) -> Tensor:
        """This part of a bucket: [bytes] uint8, where its memory begins."""
        part = torch.empty(0, dtype=self.dtype, device=flat.device)
        return part.set_(flat.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(eq=False, slots=True)
class Known:
    """What is done with one bucket."""

    places: list[Place]
    parts: list[Part] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)  # parts of parameters, one for each part of the bucket
    fills: list[tuple[Tensor, float]] = field(default_factory=list)
    _cut: dict[int, list[Tensor]] = field(default_factory=dict)  # by where the bucket was

    @torch.no_grad()
    def take(self, flat: Tensor) -> None:
        """Load a bucket: [bytes] uint8, where its memory begins. On a GPU that is begun on the current stream."""
        cut = self._cut.get(flat.data_ptr()) or [part.within(flat) for part in self.parts]
        if len(self.places) > 1:  # one tensor alone may be larger than a bucket, and its memory is not kept
            self._cut[flat.data_ptr()] = cut
        torch._foreach_copy_(self.targets, cut)
        for target, value in self.fills:
            target.fill_(value)

    def other(self) -> str:
        """What forbids to do it without the model; "" for nothing."""
        starts = [place.start for place in self.places]
        whose = {bisect_right(starts, part.offset * part.dtype.itemsize) - 1 for part in self.parts}
        left = [place.name for i, place in enumerate(self.places) if place.end > place.start and i not in whose]
        if left:
            return f"nothing copied from {left[0]}"
        # In targets that have memory in common the order would count.
        spans = sorted(_span(target) for target in chain(self.targets, (target for target, _ in self.fills)))
        return "" if all(before[1] <= after[0] for before, after in pairwise(spans)) else "something copied twice"


class Copies:
    """Those of one model: each bucket by the note of what is in it."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        self._where: list[int] = []  # parameters were when they were copied into
        self.other = ""  # why the model is always asked

    def known(self, note: bytes) -> Known | None:
        return self._known.get(note)

    def check(self, model: nn.Module) -> None:
        """Forget all once a parameter is not where it was. To be called each time before anything is copied."""
        if self._known and self._where != _places(model):
            self._known = {}

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Watch | None]:
        """What is done in here is what ``load_weights`` does. None where watching is no use."""
        if self.other:
            yield None
            return
        where = _places(model)  # before: one that moves meanwhile is not there again
        with Watch({_memory(tensor) for tensor in _tensors(model)}) as watch:
            yield watch
        self.other = watch.other or next(filter(None, (known.other() for known in watch.seen.values())), "")
        if self.other:
            print(f"weights: the model is asked to load them each time, which did more than copying: {self.other}")
        else:
            self._known, self._where = {**self._known, **watch.seen}, where
            print(f"weights: {len(watch.seen)} buckets are loaded from now on as the model did it")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what is done with one bucket after another."""

    def __init__(self, memory: set[int]) -> None:
        """``memory``: of parameters."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[bytes, Known] = {}
        self.other = ""  # what was done that is more than copying
        self._memory, self._aside = memory, False
        self._now: Known | None = None
        self._bucket = 0  # where its memory is

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here is not the model's doing."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def begin(self, note: bytes, places: list[Place], flat: Tensor) -> None:
        """A bucket is given to the model: [bytes] uint8, where its memory begins."""
        self._now, self._bucket = Known(places), _memory(flat)
        self.seen[note] = self._now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self._aside or self.other):
            self._look(func, args)
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, args: Any) -> None:
        if func is _COPY:
            self._copied(args[0], args[1])
        elif func in _FILLS:
            self._filled(args[0], args[1] if len(args) > 1 else 0)
        elif not _is_view(func):
            self._found(str(func))

    def _copied(self, target: Tensor, source: Tensor) -> None:
        if self._now is None or _memory(source) != self._bucket:
            return self._found("a copy from elsewhere")
        if _memory(target) not in self._memory or target.shape != source.shape:
            return self._found("a copy into what is no part of a parameter, or of another shape")
        if not source.numel():
            return None
        self._now.targets.append(target)
        self._now.parts.append(Part(source.dtype, source.size(), source.stride(), int(source.storage_offset())))

    def _filled(self, target: Tensor, value: float) -> None:
        if self._now is None or _memory(target) not in self._memory:
            return self._found("something filled that is no part of a parameter")
        if target.numel():
            self._now.fills.append((target, value))

    def _found(self, other: str) -> None:
        self.other = self.other or other


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(told.alias_info and not told.alias_info.is_write for told in returns)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, some perhaps twice, in an order that stays. A tenth of what ``parameters()`` takes."""
    modules = [model]
    for module in modules:
        modules += [inner for inner in module._modules.values() if inner is not None]
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def _places(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(model)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte, and of the one behind its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
