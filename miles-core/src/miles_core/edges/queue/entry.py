"""A group as the queue knows it, and what of them one call to the journal takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BATCH, MANY = 16 << 20, 512  # bytes and payloads in one call


@dataclass(slots=True, eq=False)
class Entry:
    id: int
    size: int  # bytes
    held: Any = None  # a reference to the payload, or a small one itself; None where only the journal has it
    written: bool = False
    taken: bool = False  # by the trainer: it waits no more
    gone: bool = False  # forgotten
    lost: bool = False


@dataclass(slots=True)
class Batch:
    """What one call brings to the journal."""

    gone: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def args(self) -> tuple[Any, ...]:
        held = [entry.held for entry in self.entries]
        small = [payload if isinstance(payload, bytes) else None for payload in held]
        large = [payload for payload in held if not isinstance(payload, bytes)]
        return self.gone, [entry.id for entry in self.entries], small, *large


def parts(entries: list[Entry]) -> Iterator[list[Entry]]:
    """As many at once as fit into one call."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry.size > BATCH:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.size
    if part:
        yield part
