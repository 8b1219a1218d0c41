"""Which run a folder is of: what the run's files say in their first bytes, so that none is taken for another run's."""

from __future__ import annotations

import uuid
from pathlib import Path

NAME = "run_id"


def run_id(run_dir: Path) -> str:
    """The run's id, at most 32 bytes; drawn where nobody asked before, and then the same for as long as the folder."""
    path = run_dir / NAME
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
