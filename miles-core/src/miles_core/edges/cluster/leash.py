"""Ends what a run left behind. Runs as a process of its own, so that it outlives a driver killed with SIGKILL.

The kernel takes Ray's daemons down with the driver, but not what those started: without this, Ray's agents stay for a
minute or more, and a worker busy in native code for as long as it likes. Standard input brings one line per process,
``pid born``; at its end, which is the end of the driver however it came, those still alive are killed, with all of
their process group, and the folder named on the command line is removed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

GRACE_S = 5.0  # for the kernel to take down what was killed


def born(pid: int) -> str | None:
    """When the process was started, in clock ticks since boot: with the pid it names a process for ever.

    None when it is gone, a zombie, or where there is no /proc.
    """
    fields = _stat(pid)
    return None if not fields or fields[0] == "Z" else fields[19]


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    parents = {int(p): int(f[1]) for p in _pids() if (f := _stat(int(p)))}
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def end(pid: int, since: str) -> None:
    """Kill that very process, and its group where it leads one."""
    if born(pid) != since:
        return
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces and brackets: state, parent, ..."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def main(folder: str) -> None:
    held = [(int(pid), since) for pid, since in map(str.split, sys.stdin)]
    for pid, since in held:
        end(pid, since)
    deadline = time.monotonic() + GRACE_S
    while any(born(pid) == since for pid, since in held) and time.monotonic() < deadline:
        time.sleep(0.01)
    while os.path.isdir(folder) and time.monotonic() < deadline + GRACE_S:
        shutil.rmtree(folder, ignore_errors=True)  # in vain where a process that is dying writes its log meanwhile
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
