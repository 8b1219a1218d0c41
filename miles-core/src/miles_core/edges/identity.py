"""Which run a folder is of: what the run's files say in their first bytes, so that none is taken for another run's."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

NAME = "run_id"


def run_id(run_dir: Path) -> str:
    """The run's id, at most 32 bytes; drawn where nobody asked before, and then the same for as long as the folder.

    It is on the disk before it is returned: what is written with it may be synced, and must never outlive it.
    """
    path = run_dir / NAME
    if not path.exists():
        draft = path.with_suffix(".draft")
        with draft.open("w") as file:
            file.write(uuid.uuid4().hex[:12])
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        folder = os.open(run_dir, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path.read_text()
