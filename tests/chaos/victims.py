"""The live processes of a run, by what they are, and how to end them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

TITLES = {"rollout": b"ray::rollout-", "engine": b"ray::engine-", "queue": b"ray::queue", "trainer": b"ray::trainer-"}
REWARD, LEASH = b"miles_core.edges.reward.child", b"cluster/leash.py"


def processes(marker: Path, driver: int) -> dict[str, list[int]]:
    """Process ids by kind, of all in whose environment or working folder ``marker`` is named.

    ``ray`` are Ray's own, its daemons, agents and idle workers; ``leash`` is who cleans up after a killed driver.
    """
    found: dict[str, list[int]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
        with suppress(OSError):
            line, state = Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/stat").read_text()
            told = Path(f"/proc/{pid}/environ").read_bytes() + os.readlink(f"/proc/{pid}/cwd").encode()
            forked = pid != driver and b"/miles\0run" in line  # and about to be something else
            if str(marker).encode() in told and not forked and state.rpartition(")")[2].split()[0] != "Z":
                found.setdefault("driver" if pid == driver else _kind(line), []).append(pid)
    return found


def _kind(line: bytes) -> str:
    for kind, title in TITLES.items():
        if line.startswith(title):
            return kind
    return "reward" if REWARD in line else "leash" if LEASH in line else "ray"


def kill(pid: int) -> str | None:
    """End it for good; its name, or None where it was quicker."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return None
    return name


def left_in_shared_memory(before: set[str]) -> set[str]:
    """Files that were not there ``before`` and that no live process has mapped or open."""
    new = set(os.listdir("/dev/shm")) - before
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            held = Path(f"/proc/{pid}/maps").read_text()
            held += " ".join(os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
            new = {name for name in new if f"/dev/shm/{name}" not in held}
    return new
