"""What a rollout talks to: every local engine of the run behind one object."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from ..protocols import Completion, EngineError, Request, Worker, WorkerDied


@dataclass(eq=False, slots=True)
class Call:
    """One ``generate`` that waits for the end of the event loop's tick."""

    requests: list[Request]
    future: asyncio.Future[list[Completion]]


class LocalClient:
    """Gathers what is asked in one tick of the event loop into one call per engine, in the order of asking.

    Requests with equal prompts go to the same engine, which computes the prompt once; prompts go to the engine with
    the fewest requests, the first of them when several have as few.
    """

    def __init__(self, workers: list[Worker], timeout_s: float) -> None:
        """``timeout_s``: an engine that has not answered a call by then counts as dead."""
        self._workers, self._timeout = workers, timeout_s
        self._load = [0] * len(workers)  # requests in flight
        self._calls: list[Call] = []
        self._flushing: set[asyncio.Task[None]] = set()

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of ``requests``. Raises EngineError when an engine died or cannot answer."""
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        if not self._calls:
            loop.call_soon(self._flush)
        call = Call(requests, loop.create_future())
        self._calls.append(call)
        return await call.future

    def _flush(self) -> None:
        calls, self._calls = self._calls, []
        for part in self._parts(calls):
            task = asyncio.get_running_loop().create_task(self._serve(part))
            self._flushing.add(task)  # the event loop itself keeps no strong reference
            task.add_done_callback(self._flushing.discard)

    def _parts(self, calls: list[Call]) -> list[list[Call]]:
        """What is asked together, and answered when all of it is done."""
        return [calls]

    async def _serve(self, calls: list[Call]) -> None:
        """Split the calls over the engines, and answer each as soon as the engines it needs have answered."""
        shares: list[list[Request]] = [[] for _ in self._workers]
        needs: list[list[tuple[int, int]]] = []  # of each call's requests: the engine, and the place in its share
        engine_of: dict[tuple[int, ...], int] = {}
        for call in calls:
            places = []
            for request in call.requests:
                prompt = tuple(request.tokens)
                if (engine := engine_of.get(prompt)) is None:
                    engine = engine_of[prompt] = self._load.index(min(self._load))
                places.append((engine, len(shares[engine])))
                shares[engine].append(request)
                self._load[engine] += 1
            needs.append(places)
        asked = {i: asyncio.ensure_future(self._ask(i, share)) for i, share in enumerate(shares) if share}
        await asyncio.gather(*(self._answer(call, places, asked) for call, places in zip(calls, needs, strict=True)))

    async def _answer(
        self, call: Call, places: list[tuple[int, int]], asked: Mapping[int, asyncio.Future[list[Completion]]]
    ) -> None:
        try:
            answers = {engine: await asked[engine] for engine in dict.fromkeys(engine for engine, _ in places)}
        except Exception as error:
            if not call.future.done():
                call.future.set_exception(error)
        else:
            if not call.future.done():
                call.future.set_result([answers[engine][place] for engine, place in places])

    async def _ask(self, engine: int, requests: list[Request]) -> list[Completion]:
        worker = self._workers[engine]
        try:
            completions: list[Completion] = await worker.call("generate", requests, timeout=self._timeout)
        except WorkerDied as error:
            raise EngineError(f"{worker.name} did not answer {len(requests)} requests: {error}") from error
        finally:
            self._load[engine] -= len(requests)
        if len(completions) != len(requests):
            raise EngineError(f"{worker.name} answered {len(completions)} of {len(requests)} requests")
        return completions


class StreamingClient(LocalClient):
    """Asks each call by itself, so that none waits for the longest response of another.

    What an engine decodes together is then a matter of milliseconds, and with it the last bits of what it says.
    """

    def _parts(self, calls: list[Call]) -> list[list[Call]]:
        return [[call] for call in calls]
