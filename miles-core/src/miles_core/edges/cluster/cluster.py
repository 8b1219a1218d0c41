"""The cluster of one run: its processes, by name."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...types import Refused
from ..protocols import Process, WorkerDied
from . import leash
from .host import Host, Place
from .session import Session

CALLS = 10_000  # under way at once in one process
STARTS = 3  # of one process, where each dies before its object is built


class RayCluster:
    """Implements ``types.Cluster``. Ray starts while the driver goes on; the first ``start`` waits for it.

    Every process is a named actor that Ray never restarts by itself: a fresh process is worth nothing until the loop
    has told it what it missed. The n-th process of one name is known to Ray as ``NAME.n``, from the second on.
    """

    def __init__(self, session: Session, run_dir: Path, start_timeout: float, silence: float = 600) -> None:
        self._session, self._run_dir, self._start_timeout, self._silence = session, run_dir, start_timeout, silence
        self._namespace = f"miles-{run_dir.name}-{uuid.uuid4().hex[:8]}"
        self._started: Counter[str] = Counter()
        self._workers: list[Any] = []
        self._watches: set[asyncio.Task[None]] = set()
        self._places: dict[str, Place] = {}

    async def start(self, process: Process) -> Any:
        await self._session.answer(self._start_timeout)
        for _ in range(STARTS - 1):
            with suppress(WorkerDied):  # nobody knew it yet: another one takes its place unnoticed
                return await self._begin(process)
        return await self._begin(process)

    async def _begin(self, process: Process) -> Any:
        from .worker import RayWorker

        if self._session.local and (shortage := _shortage(process)):
            raise Refused(shortage)  # elsewhere machines may be added
        hosts = [self._places[name] for name in process.beside]
        if len({host.node for host in hosts}) > 1:
            raise Refused(
                f"{process.name} shares the GPUs of {', '.join(process.beside)}, which are on several machines"
            )
        actor = self._actor(process, hosts)
        place = await self._placed(process, actor)
        self._places[process.name] = place
        born = leash.born(place.pid) if place.node == _ray().get_runtime_context().get_node_id() else None
        worker = RayWorker(process.name, actor, place, born)
        self._workers.append(worker)
        if self._session.local:
            self._session.hold(place.pid, born)
        watch = asyncio.create_task(worker.watch(self._silence))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        try:
            await worker.build(process.target, process.args)
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def share(self, value: Any) -> Any:
        await self._session.answer(self._start_timeout)
        return _ray().put(value)  # a copy into shared memory: a thread for it costs more than it

    async def fetch(self, references: list[Any]) -> list[Any]:
        from ray.exceptions import RayError

        try:
            values: list[Any] = _ray().get(references)  # on this machine, where ``share`` put them: nothing to wait for
        except RayError as error:
            raise WorkerDied(f"a shared object is lost: {type(error).__name__}") from error
        return values

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        if not self._session.owned:
            await asyncio.gather(*(worker.kill() for worker in self._workers))
        self._workers.clear()
        await asyncio.to_thread(self._session.end)

    def _actor(self, process: Process, hosts: list[Place]) -> Any:
        self._started[process.name] += 1
        nth = self._started[process.name]
        log = None
        if self._session.local:  # elsewhere the run folder may not exist, and Ray keeps the logs
            folder = self._run_dir / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            log = str(folder / f"{process.name}.log")
        where, gpus = None, tuple[str, ...]() if not process.gpus else None
        if hosts:
            where = _on(hosts[0].node)
            gpus = tuple(gpu for host in hosts for gpu in host.gpus)
        elif process.here:
            where = _on(_ray().get_runtime_context().get_node_id())
        return (
            _ray()
            .remote(type(process.name, (Host,), {}))  # the name of the class is what ps and Ray's dashboard show
            .options(
                name=process.name if nth == 1 else f"{process.name}.{nth}",
                namespace=self._namespace,
                num_cpus=process.cpus,
                num_gpus=process.gpus,
                max_restarts=0,
                max_concurrency=CALLS,
                scheduling_strategy=where,
            )
            .remote(process.name, process.threads, log, gpus)
        )

    async def _placed(self, process: Process, actor: Any) -> Place:
        from ray.exceptions import RayError

        try:
            async with asyncio.timeout(self._start_timeout):
                place: Place = await actor.place.remote()
                return place
        except TimeoutError:
            free = _ray().available_resources()
            _ray().kill(actor)
            why = _shortage(process) or (
                f"it asks for {_amount(process.cpus, process.gpus)}, of the whole cluster "
                f"{_amount(free.get('CPU', 0), free.get('GPU', 0))} are free"
            )
            raise Refused(f"{process.name} found no room within {self._start_timeout:g} s: {why}") from None
        except RayError as error:
            raise WorkerDied(f"{process.name} did not come up: {error}") from None


def _shortage(process: Process) -> str:
    """Why no machine of the cluster could ever hold the process, or ""; Ray itself would wait for ever.

    Raises WorkerDied where there is no machine.
    """
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    if not nodes:
        raise WorkerDied(f"{process.name} cannot be started: Ray's own processes died")
    asked = {"CPU": process.cpus, "GPU": process.gpus}
    if any(all(has.get(what, 0) >= n for what, n in asked.items()) for has in nodes):
        return ""
    most = {what: max((has.get(what, 0) for has in nodes), default=0) for what in asked}
    short = "ray.cpus" if most["CPU"] < process.cpus else "the GPUs of this Ray"
    return (
        f"{process.name} asks for {_amount(process.cpus, process.gpus)}, no machine of the cluster has more than "
        f"{_amount(most['CPU'], most['GPU'])}; raise {short}, or ask for less"
    )


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _ray() -> Any:
    import ray

    return ray
