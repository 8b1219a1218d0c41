"""One address for all engines of a run: which of them gets a prompt, and which are in service at all.

There is no process for it, neither SGLang's router nor one of ours. Every rollout worker asks for all tokens of its
share of the prompts through one client, so the client knows what each engine has to do, and the shares of the workers
are even. A process between would pass every token on once more, be one more thing to die in the middle of a rollout,
and know less: which server is whose successor, and what an engine says is wrong with it, only the engines' own
processes tell. SGLang's own router, a wheel of its own, reads each request into the fields that it knows and writes it
anew: as of 0.3.2 it refuses names and sampling parameters one for each prompt, so a group would be as many calls as it
has attempts, and drops ``return_sampling_mask``, without which the log-probabilities of a cut vocabulary are not told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Hashable
from dataclasses import dataclass

from ..protocols import EngineError, Worker, WorkerDied
from . import wire
from .calls import Caller

ANSWER_S = 60.0  # an engine's own process that says nothing for so long is killed; it has little else to do
FIRST_WAIT_S, LAST_WAIT_S = 0.1, 2.0  # between two questions to an engine that is out of service


@dataclass(eq=False, slots=True)
class Route:
    """One engine as its users see it."""

    worker: Worker
    address: str = ""  # of the server that was last in service
    call: Caller | None = None  # to it
    up: bool = False  # in service
    asked: bool = False  # whether it is
    why: str = "it was not asked yet"  # not in service
    lost: bool = False  # its process is gone, and nothing brings it back
    load: int = 0  # requests in flight


class Router:
    """Requests of one group go to one engine, whose prefix cache then holds the prompt; groups go to the engine with
    the fewest requests in flight, the first of them when several have as few. Once nothing is in flight groups are
    forgotten: new weights empty the caches.

    An engine enters service when its process gives an address and the server there answers as the one it should be,
    leaves when a request fails, and is asked again and again from then on. Those in service are not asked how they
    are: their own processes watch them, and end the requests of one that hangs by replacing it.
    """

    def __init__(self, workers: list[Worker]) -> None:
        self.routes = [Route(worker) for worker in workers]
        self.vocab = 0  # of the model, which all engines share; 0 while it is not known
        self._homes: dict[Hashable, Route] = {}
        self._change = asyncio.Event()  # some engine answered
        self._asking: dict[Route, asyncio.Task[None]] = {}

    def choose(self, group: Hashable, size: int, shunned: Container[Route] = ()) -> Route | None:
        """The engine for ``size`` requests of a group, counted as in flight from now on; None when none is in service.

        One of ``shunned`` only when there is no other. Call ``done`` when the requests came back.
        """
        route = self._homes.get(group)
        if route is None or not route.up or route in shunned:
            well = [route for route in self.routes if route.up]
            route = min(well, key=lambda route: (route in shunned, route.load), default=None)
        if route is None:
            return None
        self._homes[group] = route
        route.load += size
        return route

    def done(self, route: Route, size: int) -> None:
        route.load -= size
        if not any(route.load for route in self.routes):
            self._homes.clear()

    def out(self, route: Route, address: str, why: str) -> None:
        """Take an engine out of service, unless it is another server by now than the one that failed."""
        if route.up and route.address == address:
            route.up, route.why = False, why
            self._asking[route] = asyncio.ensure_future(self._ask(route))

    async def wait(self, timeout_s: float) -> None:
        """Returns when some engine is in service, and all had the chance to be: the first must not get everything.

        Raises EngineError with every engine's reason when none is in service in time.
        """
        for route in self.routes:
            if not (route.up or route.lost or route in self._asking):
                self._asking[route] = asyncio.ensure_future(self._ask(route))
        try:
            async with asyncio.timeout(timeout_s):
                while not (any(route.up for route in self.routes) and all(route.asked for route in self.routes)):
                    if all(route.lost for route in self.routes):
                        raise EngineError(f"every engine is lost: {self._reasons()}")
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError:
            raise EngineError(f"no engine was in service for {timeout_s:g} s: {self._reasons()}") from None

    def _reasons(self) -> str:
        return "; ".join(f"{route.worker.name}: {route.why}" for route in self.routes)

    async def _ask(self, route: Route) -> None:
        """Ask an engine for its address until it is well or lost."""
        wait = FIRST_WAIT_S
        try:
            while not await self._admit(route):
                route.asked = True
                self._change.set()
                await asyncio.sleep(wait)
                wait = min(2 * wait, LAST_WAIT_S)
        except WorkerDied as error:
            route.lost, route.why = True, str(error)
        route.asked = True
        self._asking.pop(route, None)
        self._change.set()

    async def _admit(self, route: Route) -> bool:
        """Whether the engine is in service now. Raises WorkerDied."""
        try:
            address = await route.worker.call("address", timeout=ANSWER_S)
            self.vocab = await route.worker.call("vocab", timeout=ANSWER_S)
            if route.address != address:
                await self._move(route, address)
            assert route.call is not None
            told = await route.call.get("/model_info")
            wire.version_of(told["weight_version"], wire.parts_of(address)[1])
        except EngineError as error:
            route.why = str(error)
        except (LookupError, TypeError) as error:
            route.why = f"its server does not answer as SGLang does: {error!r}"
        else:
            route.up = True
        return route.up

    async def _move(self, route: Route, address: str) -> None:
        """Take note of another server, after the one before is gone, and with it what was in flight there."""
        if route.call:
            await route.call.close()
        route.address, route.call = address, Caller(wire.parts_of(address)[0])
