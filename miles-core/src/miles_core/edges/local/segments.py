"""Read a shared-memory segment that another process owns."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..protocols import TransportError


@contextmanager
def attached(path: str) -> Iterator[mmap.mmap]:
    """The bytes of a segment, while the block runs. Raises TransportError when there is none at ``path``."""
    try:
        handle = os.open(path, os.O_RDWR)  # torch wants buffers it could write to; nobody does
    except OSError as error:
        raise TransportError(
            f"shared memory {path}: {error.strerror}; its sender is gone, or is not a process of this machine"
        ) from None
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
            pass  # an error on its way still holds a tensor over it; the mapping goes with the last of them
