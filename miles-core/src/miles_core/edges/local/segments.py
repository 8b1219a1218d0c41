"""Read a shared-memory segment that another process owns."""

from __future__ import annotations

import mmap
import os
from _posixshmem import shm_open  # type: ignore[import-not-found]
from collections.abc import Iterator
from contextlib import contextmanager

from ...types import TransportError


@contextmanager
def attached(name: str) -> Iterator[mmap.mmap]:
    """The bytes of a segment, while the block runs. Raises TransportError when there is none of this name.

    ``multiprocessing.shared_memory`` would register the segment with this process's resource tracker, which unlinks
    it when this process ends, under the owner's feet. Opening it plainly, as that class does itself, leaves it alone.
    """
    try:
        handle = shm_open(f"/{name}", os.O_RDWR, mode=0o600)
    except OSError as error:
        raise TransportError(f"shared memory {name}: {error.strerror}; is the sender on this machine?") from None
    try:
        mapped = mmap.mmap(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)
    try:
        yield mapped
    finally:
        try:
            mapped.close()
        except BufferError:
            pass  # a tensor over it is still being freed; the mapping goes with the last of them
