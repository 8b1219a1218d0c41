"""Of a damaged journal, all that is whole, as a journal that a run can go on with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .disk import claim, promise, sync
from .segment import Scan, rewrite
from .survey import survey


def salvage(folder: Path, run: str) -> list[str]:
    """Put segments without what is damaged in the place of damaged ones, which stay beside them.

    Returns what was done, in words. Raises Refused while a process writes, and of another run's journal.
    """
    lock = claim(folder)
    try:
        found = survey(folder, run)
        count = sum(not head.gone for s in found.scans.values() for _, head in s.records)
        if not found.refused:
            return [f"{folder} is whole: {count} groups; there is nothing to salvage"]
        said = [_replace(one, run) for one in found.scans.values() if one.flaws]
        last = max(found.scans)
        for one in found.scans.values():
            sync(one.path)
        sync(folder)
        promise(folder, last, found.scans[last].path.stat().st_size)
    finally:
        os.close(lock)
    kept = f"{count} groups of the queue are kept; those that are lost are sampled again when the run goes on"
    return [*said, f"{kept}, and none of their prompts is: the ledger has them all"]


def _replace(found: Scan, run: str) -> str:
    path = found.path
    aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.broken-{n}")).exists())
    shutil.copy2(path, aside)
    rewrite(found, run)
    return f"{path} was damaged at byte {found.flaws[0].at}: {found.flaws[0].text}; the broken segment is now {aside}"
