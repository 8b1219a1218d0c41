"""What tests of whole runs compare and look for."""

from __future__ import annotations

import asyncio
import os
import warnings
from pathlib import Path

from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.testing.runs import INLINE


def here(file: Path, folder: Path, *keys: str, resume: bool = False) -> None:
    """A run whose driver is this process, which has loaded what one needs."""
    source = Source([file], [*keys, f"run_dir={folder}"])
    with warnings.catch_warnings(action="ignore"):  # Megatron's, about what this machine lacks
        from miles_core.loop.driver import train

        asyncio.run(train(assemble(source).at(folder), folder, resume))


def in_threads(file: Path, folder: Path, *keys: str, resume: bool = False) -> None:
    """One rank may be a thread of this process: the same loop, without the seconds that processes take to start."""
    here(file, folder, *keys, f'plugins=["{INLINE}"]', resume=resume)


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
