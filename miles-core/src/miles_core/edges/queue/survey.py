"""What a folder of segments holds, and what a power cut explains of its damage.

All that a sync promised was on the disk before ``disk.promise`` said so. Of what was written later a power cut may
leave any part, in any order: there, everything from the first damaged byte on is cut. Where damage stands before what
was promised, the disk or somebody else did it: with whole records behind it, it is refused. With none it is the
journal's end, which is cut.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...types import Refused
from .disk import promised
from .segment import FORMAT, LABEL, Flaw, Scan, scan


@dataclass(frozen=True, slots=True)
class Survey:
    """Segments by number, in order, and where the first flaw of them all is."""

    scans: dict[int, Scan]
    promised: tuple[int, int]
    first: tuple[int, Flaw] | None

    @property
    def refused(self) -> bool:
        """Whether something that was promised is damaged, and is not the end."""
        if self.first is None:
            return False
        number, flaw = self.first
        return (number, flaw.at) < self.promised and self.behind() > 0

    def behind(self) -> int:
        """How many whole records stand behind the first flaw, forgotten ones too."""
        assert self.first
        number, flaw = self.first
        return sum(at > flaw.at if n == number else n > number for n, s in self.scans.items() for at, _ in s.records)

    def refuse(self) -> None:
        """Raises Refused with the place and what to do, where damage is more than a crash explains."""
        if self.refused and self.first:
            number, flaw = self.first
            path = self.scans[number].path
            raise Refused(
                f"{path} is damaged at byte {flaw.at}: {flaw.text}, and whole ones follow; "
                f"what can be saved is saved by: miles audit {path.parent.parent} --salvage"
            )

    def cut(self) -> list[str]:
        """Take everything from the first flaw on away, on disk too. Returns what was done, in words."""
        if self.first is None:
            return []
        number, flaw = self.first
        found, behind = self.scans[number], self.behind()
        more = f", and {behind} whole records behind them, which were not synced yet" if behind else ""
        for later in [n for n in self.scans if n > number]:
            self.scans.pop(later).path.unlink()
        os.truncate(found.path, flaw.at if flaw.at > LABEL else 0)
        found.records = [(at, head) for at, head in found.records if at < flaw.at]
        size, found.size = found.size - flaw.at, flaw.at
        return [f"{found.path}: {flaw.text}; the last {size} bytes are cut{more}; their prompts are sampled again"]


def survey(folder: Path, run: str) -> Survey:
    """Read every segment. Raises Refused where one is of another run or format; nothing is changed."""
    scans = {int(path.stem): scan(path) for path in sorted(folder.glob("*.seg"), key=lambda path: int(path.stem))}
    for found in scans.values():
        _own(found, run)
    flaws = ((number, flaw) for number, found in scans.items() for flaw in found.flaws)
    return Survey(scans, promised(folder), next(flaws, None))


def _own(found: Scan, run: str) -> None:
    if found.label is None:
        return
    format, other = found.label
    folder = found.path.parent
    aside = f"move {folder} aside: its groups are then sampled again"
    if format != FORMAT:
        raise Refused(
            f"{found.path} is written in format {format}, and this Miles reads {FORMAT}; "
            f"use the one that wrote it, or {aside}"
        )
    if other != run:
        raise Refused(
            f"{found.path} is of the queue of run {other}, and this is run {run}; "
            f"give this run a run_dir of its own, or {aside}"
        )
