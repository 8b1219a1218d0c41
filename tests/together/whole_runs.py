"""What tests of whole runs compare and look for."""

from __future__ import annotations

import os
from pathlib import Path


def timeless(rows: list[dict]) -> list[dict]:
    """Metrics without those that a clock writes."""
    clocks = ("time", "tokens_per_s", "sync/", "utilization/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def processes_of(marker: str) -> list[str]:
    """Command lines of live processes that mention ``marker`` in their arguments, environment or working folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            told += os.readlink(f"/proc/{pid}/cwd").encode()
        except OSError:
            continue
        if marker.encode() in told and int(pid) != os.getpid():
            found.append(f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()}")
    return found
