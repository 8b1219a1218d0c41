"""One run of the stock server: its processes, the port it listens on, and what it printed last."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

TAIL_LINES = 30
GONE_S = 5.0  # for killed processes to disappear
# NCCL decides for itself, as in the trainers, how a GPU reads another's memory. SGLang would turn one of the two ways
# off in its server alone, and ends that do not agree fail at the first broadcast, or wait for each other for ever.
AGREED = {"NCCL_CUMEM_ENABLE": "-2"}


class ServerProcess:
    """A server under a guard (see ``guard``). What it prints goes on to this process's own output, so into its log."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start ``command``; returns at once. ``ended`` is set in the running event loop when all of it is gone."""
        self.ended = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=AGREED | os.environ,
        )
        self._reader = threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Kill the server and all that it started, without waiting for them to be gone."""
        # Whoever holds the other end of the pipe is of the group: while there is one, the group's id is nobody else's.
        if self._reader.is_alive() or self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """``stop``, and wait until they are gone, and their memory with them."""
        self.stop()
        self._process.wait()
        self._reader.join(GONE_S)
        assert self._process.stdin is not None
        self._process.stdin.close()
        deadline = monotonic() + GONE_S
        while monotonic() < deadline and any(state != "Z" for state in states(self._process.pid)):
            sleep(0.01)

    def last_words(self) -> str:
        """The end of what the server printed, to be put behind a complaint."""
        if not self.alive:
            self.stop()
            self._reader.join(GONE_S)  # what it said last may still be in the pipe
        lines = [line for line in self._tail if line]
        return "".join(f"\n  {line}" for line in ["its last lines:", *lines]) if lines else "; it printed nothing"

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text[:400])  # it prints all of its arguments in one line
            print(text, flush=True)
        self._process.wait()  # the pipe closes a moment before its last process counts as ended
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self.ended.set)


def states(group: int) -> list[str]:
    """States of the processes of a group, as the kernel tells them; none where it has no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is gone by now
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group:
                found.append(state)
    return found


def free_port(host: str) -> int:
    """A port that nobody listens on now; somebody may by the time it is used."""
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections linger
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def own_address() -> str:
    """The address that other machines reach this one by; the loopback's where there is no way out. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        address: str = out.getsockname()[0]
        return address
