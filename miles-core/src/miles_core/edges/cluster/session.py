"""This process's connection to Ray, from ``ray.init`` to ``ray.shutdown``, in a thread of its own.

The thread is more than a way to keep the event loop turning while Ray starts. Ray's daemons ask the kernel to die with
their parent, and to the kernel the parent is the thread that forked them, not its process: the thread that started Ray
must live as long as the driver. And ``ray.init`` takes over SIGTERM, in Python, when it runs in the main thread.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...types import Refused
from ..protocols import WorkerDied
from . import leash

# Processes here run in workers of their own making: a pool started ahead is a second of two cores' time for nothing.
# By default workers give way to whatever else the machine does (niceness 15): a training run is what it does.
# Nobody starts Ray's control server again when it died: by default the driver waits a minute before Ray ends it.
SYSTEM = {"enable_worker_prestart": False, "worker_niceness": 0, "gcs_rpc_server_reconnect_timeout_s": 10}
# Ray reads these when it is imported. The message is Ray's own line on stdout about a dead worker, which comes on top
# of the exception, and into the middle of a progress line.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing"}
LONGEST_TEMP = 24  # characters; our name and Ray's add 80 to make a Unix socket, and the kernel takes 107
END_S = 30.0  # for Ray's processes to go


class Session:
    """Ray as this process sees it. A Ray that this process already uses is shared, and left running.

    ``options`` are those of ``ray.init``. ``ready`` is done once Ray answers; its exception is what hindered it,
    Refused where the address is at fault, WorkerDied where a local Ray did not come up.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.local = options["address"] == "local"
        self.owned = False
        self.ready: Future[None] = Future()
        self.ready.set_running_or_notify_cancel()  # who stops waiting for it must not cancel it for the others
        self._options, self._leash = options, None if not self.local else _Leash()
        self._over, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._live, name="ray-session", daemon=True).start()

    async def answer(self, timeout: float) -> None:
        """Wait for Ray. Raises Refused where it did not answer in ``timeout`` seconds, or will not."""
        if not self.ready.done():
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.wrap_future(self.ready)
            except TimeoutError:
                address = self._options["address"]
                raise Refused(f"ray.address = {address!r}: Ray did not answer within {timeout:g} s") from None
        self.ready.result()
        _take_back(signal.SIGTERM)

    def hold(self, pid: int, since: str | None) -> None:
        """See to it that this process of a local Ray ends with the driver."""
        if self._leash and since:
            self._leash.hold(pid, since)

    def end(self) -> None:
        """Leave Ray, and end it where this run started it; blocks until its processes are gone."""
        self._over.set()
        if self.local or self.ready.done():  # joining may never come to an end
            self._ended.wait(END_S)
        atexit.unregister(self.end)

    def _live(self) -> None:
        try:
            self._begin()
        except BaseException as error:
            self._finish()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        self._over.wait()
        self._finish()

    def _begin(self) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            self.local = False
            return
        options = self._options | {"log_to_driver": False, "logging_level": "ERROR"}
        if self._leash:
            options |= {"_temp_dir": str(self._leash.folder), "_system_config": SYSTEM}
        try:
            ray.init(**options)
        except ValueError as error:
            raise Refused(f"ray.address = {self._options['address']!r}: Ray did not start: {error}") from error
        except Exception as error:
            if self.local:  # one of its processes died, or found the machine too busy: no fault of what was asked for
                raise WorkerDied(f"Ray did not come up on this machine: {error}") from error
            if not isinstance(error, ConnectionError):
                raise
            address = self._options["address"]
            raise Refused(f"ray.address = {address!r}: no Ray to join; is one running there? {error}") from error
        self.owned = True
        atexit.register(self.end)  # after Ray registered its own, hence asked before it
        if self._leash:
            daemons = [pid for pid in leash.descendants(os.getpid()) if _is_raylet(pid)]
            for pid in (child for raylet in daemons for child in leash.descendants(raylet)):
                self.hold(pid, leash.born(pid))

    def _finish(self) -> None:
        try:
            if self.owned:
                import ray

                ray.shutdown()
        finally:
            if self._leash:
                self._leash.close()
            self._ended.set()


class _Leash:
    """The process of ``leash.py``, and the folder it removes: Ray's files, sockets and logs."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="miles-", dir=base if len(base) <= LONGEST_TEMP else "/tmp"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", leash.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def hold(self, pid: int, since: str) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # somebody killed it: a run need not end for want of a second safety
            self._process.stdin.write(f"{pid} {since}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.wait():  # it was killed itself
            shutil.rmtree(self.folder, ignore_errors=True)


def _take_back(number: signal.Signals) -> None:
    """Let Python answer a signal again, as before Ray. Its library puts a handler of its own in front, in any thread,
    which sets an alarm: three seconds after the signal the process is aborted, in the midst of tidying up."""
    handler = signal.getsignal(number)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
        signal.siginterrupt(number, False)  # as asyncio has it


def _is_raylet(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    except OSError:
        return False
