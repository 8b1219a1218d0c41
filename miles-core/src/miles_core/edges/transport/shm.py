"""One training rank's end of the shared-memory transport: it fills one bucket while the engines load the other."""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ...types import Layout
from ..protocols import Bucket, Piece, TransportError, Worker

ALIGNMENT = 64  # of each tensor in a bucket: any dtype, and a cache line


class Segment:
    """One bucket's memory, its pieces so far, and the loads that read it.

    The memory has no name in any file system: engines reach it through this process's open file. So it is gone when
    this process is, however it ended, and no ``/dev/shm``, which containers keep small, limits it.
    """

    def __init__(self, size: int) -> None:
        handle = os.memfd_create("miles-weights")
        os.ftruncate(handle, max(size, 1))
        self.memory, self.path = mmap.mmap(handle, max(size, 1)), f"/proc/{os.getpid()}/fd/{handle}"
        self.size, self.used = size, 0
        self.pieces: list[Piece] = []
        self.loads: list[tuple[Worker, Future[dict[str, int]]]] = []
        self.free = weakref.finalize(self, _free, self.memory, handle)

    def fits(self, tensor: Tensor) -> bool:
        return self.used + tensor.nbytes <= self.size

    def put(self, name: str, tensor: Tensor, verify: bool) -> None:
        """Copy ``tensor``, of any strides and device, behind the pieces that are there."""
        offset, length = self.used, tensor.nbytes
        if length:
            there = torch.frombuffer(self.memory, dtype=tensor.dtype, offset=offset, count=tensor.numel())
            there.view(tensor.shape).copy_(tensor)
        checksum = zlib.crc32(memoryview(self.memory)[offset : offset + length]) if verify else None
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.pieces.append(Piece(name, dtype, tuple(tensor.shape), offset, length, checksum))
        self.used = -(-(offset + length) // ALIGNMENT) * ALIGNMENT

    def bucket(self) -> Bucket:
        return Bucket(self.path, tuple(self.pieces))

    def settle(self) -> None:
        """Wait for every engine to have loaded what is in it, then empty it. Raises TransportError of the first fault.

        Waits for all of them even when one fails: nobody may be reading when the memory is filled again or freed.
        """
        loads, self.loads = self.loads, []
        pieces, self.pieces, self.used = self.pieces, [], 0
        faults: list[TransportError] = []
        for engine, load in loads:
            try:
                loaded = load.result()
            except Exception as error:
                faults.append(_failure(engine.name, pieces, error))
            else:
                faults += _differences(engine.name, pieces, loaded)
        if faults:
            raise faults[0]


class SharedMemoryTransport:
    """Implements ``miles_core.types.Transport``. Nothing is allocated before the first tensor."""

    def __init__(self, bucket_bytes: int, timeout_s: float) -> None:
        """Two buckets of ``bucket_bytes``; an engine that has not loaded one in ``timeout_s`` counts as dead."""
        self._size, self._timeout = bucket_bytes, timeout_s
        self._engines: list[Worker] = []
        self._buckets: list[Segment] = []  # at most two, kept from one update to the next
        self._pool: ThreadPoolExecutor | None = None

    def connect(self, engines: list[Worker], layout: Layout) -> None:
        self._engines = engines
        self._pool = ThreadPoolExecutor(max_workers=2 * len(engines), thread_name_prefix=f"weights-{layout.rank}")

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool, servers: list[str]) -> dict[str, float]:
        """Send all that ``tensors`` yields to every engine.

        Returns ``bytes`` and ``tensors``. Raises TransportError naming the tensor and the engine, after every engine
        has stopped reading; the memory is freed then.
        """
        sent, count, current = 0, 0, 0
        try:
            for name, tensor in tensors:
                sent, count = sent + tensor.nbytes, count + 1
                if tensor.nbytes > self._size:
                    self._send_alone(name, tensor, verify)
                    continue
                segment = self._segment(current)
                if not segment.fits(tensor):
                    self._post(segment)
                    current = 1 - current
                    segment = self._segment(current)
                    segment.settle()
                segment.put(name, tensor, verify)
            if count:
                self._post(self._segment(current))
            for segment in self._buckets:
                segment.settle()
        except BaseException:
            self._release()
            raise
        return {"bytes": float(sent), "tensors": float(count)}

    def close(self) -> None:
        """Free the memory and end the threads. May be called twice, and without ``connect``."""
        self._release()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _segment(self, which: int) -> Segment:
        while len(self._buckets) <= which:
            self._buckets.append(Segment(self._size))
        return self._buckets[which]

    def _send_alone(self, name: str, tensor: Tensor, verify: bool) -> None:
        """A tensor larger than a bucket gets one of its own size, for as long as it travels."""
        segment = Segment(tensor.nbytes)
        try:
            segment.put(name, tensor, verify)
            self._post(segment)
        finally:
            try:
                segment.settle()
            finally:
                segment.free()

    def _post(self, segment: Segment) -> None:
        """Ask every engine to load what is in ``segment``, without waiting."""
        if self._pool is None:
            raise TransportError("send before connect")
        bucket = segment.bucket()
        for engine in self._engines:
            load = self._pool.submit(engine.ask, "load", bucket, timeout=self._timeout)
            segment.loads.append((engine, load))

    def _release(self) -> None:
        """Free every segment, once nobody reads it any more."""
        for segment in self._buckets:
            for _, load in segment.loads:
                load.cancel()
                if not load.cancelled():
                    load.exception()  # waits; its cause is being raised already, or nobody asks
            segment.free()
        self._buckets.clear()


def _free(memory: mmap.mmap, handle: int) -> None:
    os.close(handle)
    try:
        memory.close()
    except BufferError:
        pass  # an error on its way still holds a tensor over it; the mapping goes with the last of them


def _differences(engine: str, pieces: list[Piece], loaded: dict[str, int]) -> Iterator[TransportError]:
    for piece in pieces:
        if piece.checksum is not None and (there := loaded.get(piece.name)) != piece.checksum:
            found = "no checksum" if there is None else f"crc32 {there:08x}"
            yield TransportError(
                f"{piece.name} did not arrive in {engine} as it was sent: {found}, sent {piece.checksum:08x}"
            )


def _failure(engine: str, pieces: list[Piece], error: Exception) -> TransportError:
    first, last = pieces[0].name, pieces[-1].name
    which = first if first == last else f"{first} ... {last} ({len(pieces)} tensors)"
    failure = TransportError(f"{engine} did not load {which}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
