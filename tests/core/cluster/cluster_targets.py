"""Classes that the tests run in processes of their own, and the driver that they end in every way there is."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from miles_core.edges.cluster.cluster import RayCluster
from miles_core.edges.cluster.session import Session
from miles_core.edges.protocols import Process, WorkerDied
from miles_core.types import Refused

LOCAL = {"address": "local", "num_cpus": 8, "object_store_memory": 100 << 20, "include_dashboard": False}


class Odd(Exception):
    """Pickles, but does not unpickle: its constructor takes two arguments and passes on one."""

    def __init__(self, what, count):
        super().__init__(f"{count} odd {what}")


class Mine(Exception):
    def __init__(self, message, sample):
        super().__init__(message, sample)
        self.sample = sample


def _rebuild():
    raise ValueError("cannot be rebuilt")


class OneWay:
    """Can be pickled, and no more."""

    def __reduce__(self):
        return _rebuild, ()


class Stillborn:
    """Dies while it is constructed, ``times`` times."""

    def __init__(self, count, times):
        count.write_text(count.read_text() + ".")
        if len(count.read_text()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)

    def lives(self):
        return True


class Plain:
    """No async method: one thread for all of it."""

    def __init__(self, *args):
        self.args, self.threads, self.calls = args, [threading.get_ident()], 0

    def where(self):
        self.threads.append(threading.get_ident())
        return self.threads

    def count(self):
        seen = self.calls
        threading.Event().wait(0.001)
        self.calls = seen + 1
        return self.calls

    def echo(self, *values):
        return values[0] if len(values) == 1 else values

    def pid(self):
        return os.getpid()

    def environment(self):
        import torch

        title = Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
        return os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), title

    def fail(self, kind):
        try:
            {}["deep"]
        except KeyError as cause:
            error = {"mine": Mine("no luck", 7), "odd": Odd("shoes", 3), "exit": SystemExit(2)}[kind]
            if kind == "mine":
                error.add_note("in miles_loss of plugin x")
            raise error from cause

    def unpicklable(self):
        return threading.Lock()

    def die(self):
        print("the last thing I said", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self, seconds):
        threading.Event().wait(seconds)

    def later(self, fails):
        """What is done once ``sleep(0.2)`` would be, in another thread."""
        future = Future()
        end = future.set_exception if fails else future.set_result
        threading.Timer(0.2, end, [OSError("/disk: full") if fails else "written"]).start()
        return future

    def ask(self, other, method, *args):
        return other.ask(method, *args)

    def child(self):
        """Two processes that nobody waits for, one of them deaf to everything but SIGKILL."""
        deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
        return [subprocess.Popen(["sleep", "1000"]).pid, subprocess.Popen([sys.executable, "-c", deaf]).pid]

    def spin(self):
        while True:
            pass


class Broken:
    def __init__(self, path):
        raise Mine(f"cannot build from {path}", 1)


class Async:
    def __init__(self):
        self.gate, self.waiting = asyncio.Event(), 0

    async def meet(self, n):
        """Returns once ``n`` calls are here at the same time."""
        self.waiting += 1
        if self.waiting == n:
            self.gate.set()
        await self.gate.wait()
        return self.waiting

    def plain(self):
        return threading.get_ident()

    async def fail(self):
        raise Mine("async", 2)

    async def forward(self, other, method, *args):
        return await other.call(method, *args)


async def main(ending: str, run_dir: Path) -> None:
    """A driver: three processes, one in a loop and one with children; then the end that a line on stdin allows."""
    if ending == "cancel":  # what a driver does that wants to tidy up
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    cluster = RayCluster(Session(LOCAL), run_dir, 120)
    try:
        names = ["one", "two", "three"]
        one, two, three = await asyncio.gather(
            *(cluster.start(Process(name, "cluster_targets:Plain", cpus=0.5)) for name in names)
        )
        await one.call("child")
        spinning = asyncio.ensure_future(two.call("spin"))
        with suppress(WorkerDied):
            await three.call("die")
        print("ready", flush=True)
        if ending in ("close", "error", "leave", "abandon"):
            await asyncio.to_thread(sys.stdin.readline)
        else:
            await spinning
        if ending == "error":
            raise RuntimeError("an error of the driver")
        if ending == "abandon":
            os._exit(5)
    finally:
        if ending == "cancel":
            await asyncio.sleep(4)  # longer than Ray's library would let a process live that was told to end
        if ending != "leave":
            await cluster.close()


async def join(address: str, run_dir: Path) -> None:
    """A driver that joins a Ray; its one process ends with it."""
    cluster = RayCluster(Session({"address": address}), run_dir, 10 if "127.0.0.1" in address else 60)
    try:
        worker = await cluster.start(Process("plain", "cluster_targets:Plain", cpus=0.1))
    except Refused as refused:
        print(refused)
        await cluster.close()
        return
    print(await worker.call("pid"), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await cluster.close()


if __name__ == "__main__":
    asyncio.run((join if sys.argv[1] == "auto" or ":" in sys.argv[1] else main)(sys.argv[1], Path(sys.argv[2])))
