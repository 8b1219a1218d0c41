"""What a rollout talks to: every SGLang engine of the run behind one object."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Hashable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..protocols import Completion, EngineError, Request, Worker, WorkerDied
from . import wire
from .calls import Declined, Silent
from .router import ANSWER_S, Route, Router

BATCH = 64  # most requests in one call; as many go out as come together, and come back together
FIRST_WAIT_S = 0.2  # before a request is asked again; twice as long each time
TRANSIENT = (429, 500, 502, 503, 504)  # the server is not up to it now


@dataclass(eq=False, slots=True)
class Job:
    """One request, until its whole completion is there."""

    request: Request
    future: asyncio.Future[Completion]
    asked: int = 0  # in which call of ``generate``
    part: Completion = field(default_factory=lambda: Completion([], [], [], "abort"))  # so far
    tries: int = 0  # that failed
    shunned: set[Route] = field(default_factory=set)  # where
    cut_at: int = -1  # the version whose end last cut it short before its first token
    rid: str = ""  # its name at the server, while it is there
    alone: bool = False  # its group shares a call with no other

    @property
    def group(self) -> Hashable:
        """Equal for requests that share a prefix: samples are called GROUP/ATTEMPT, others are told by their prompt."""
        group, slash, _ = self.request.id.rpartition("/")
        return group if slash else tuple(self.request.tokens)

    def rest(self) -> Request:
        """What is left to ask for: the request goes on behind the tokens that it has."""
        written = self.part.tokens
        if not written:
            return self.request
        left = replace(self.request.sampling, max_tokens=self.request.sampling.max_tokens - len(written))
        return replace(self.request, tokens=self.request.tokens + written, sampling=left)

    def add(self, more: Completion) -> None:
        self.part = Completion(
            self.part.tokens + more.tokens,
            self.part.logprobs + more.logprobs,
            self.part.versions + more.versions,
            more.finish,
        )

    def finish(self) -> None:
        if not self.future.done():  # else whoever asked gave up
            self.future.set_result(self.part)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class SGLangClient:
    """Gathers what is asked in one tick of the event loop into calls of up to ``BATCH`` requests per engine.

    A request is a job until it is answered whole, and answered once: what fails, because a server died, hung or gave
    nonsense, is asked again, of an engine that is in service then, at most ``MOST_TRIES`` times in all. What an update
    of the weights cut short goes on where it was, its first tokens with the old version.
    """

    def __init__(self, workers: list[Worker], timeout_s: float) -> None:
        """``timeout_s``: an engine that has not answered a call by then is restarted; none in service by then fails."""
        self._router, self._timeout = Router(workers), timeout_s
        self._asked = 0  # calls of ``generate``
        self._jobs: list[Job] = []  # of this tick
        self._rids: set[str] = set()  # in flight
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of ``requests``.

        Raises EngineError when a request cannot be answered, or was not in ``MOST_TRIES`` tries.
        """
        loop = asyncio.get_running_loop()
        self._asked += 1
        jobs = [Job(request, loop.create_future(), self._asked) for request in requests]
        for job in jobs:
            if not job.request.tokens:
                raise EngineError(f"request {job.request.id}: no prompt tokens")
        self._queue(jobs)
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        finally:
            for job in jobs:
                job.future.cancel()  # no-op on those that are done; the others are not asked again

    # -- from jobs to calls --------------------------------------------------------------------------------------

    def _queue(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.future.done():
                continue
            if job.rest().sampling.max_tokens < 1:
                job.add(Completion([], [], [], "length"))
                job.finish()
                continue
            if not self._jobs:
                asyncio.get_running_loop().call_soon(self._flush)
            self._jobs.append(job)

    def _flush(self) -> None:
        """Send the jobs of a tick: whole groups to one engine each, in calls as large as they may be."""
        groups: dict[Hashable, list[Job]] = {}
        for job in self._jobs:
            if foreign := self._foreign(job.request):
                job.fail(foreign)
            else:
                groups.setdefault(job.group, []).append(job)
        self._jobs = []
        calls: dict[Route, list[Job]] = {}
        homeless: list[Job] = []
        for group, jobs in groups.items():
            route = self._router.choose(group, len(jobs), set[Route]().union(*(job.shunned for job in jobs)))
            if route is None:
                homeless += jobs
                continue
            if apart := self._apart(jobs):
                for part in apart:
                    self._spawn(self._send(route, part))
                continue
            if len(calls.setdefault(route, [])) + len(jobs) > BATCH and calls[route]:
                self._spawn(self._send(route, calls.pop(route)))
            calls.setdefault(route, []).extend(jobs)
        for route, jobs in calls.items():
            self._spawn(self._send(route, jobs))
        if homeless:
            self._spawn(self._shelter(homeless))

    def _apart(self, jobs: list[Job]) -> list[list[Job]]:
        """The calls for a group that shares none with others; none where it may share one."""
        return [jobs] if jobs[0].alone else []

    def _caches(self, jobs: list[Job]) -> list[str] | None:
        """With what each job shares keys and values at the server; None where all may."""
        return None

    def _foreign(self, request: Request) -> EngineError | None:
        """What is wrong with a request that would kill one server after another: they look up any token they get."""
        vocab = self._router.vocab
        if not vocab or 0 <= min(request.tokens) and max(request.tokens) < vocab:
            return None
        wrong = next(token for token in request.tokens if not 0 <= token < vocab)
        return EngineError(f"request {request.id}: token {wrong} is outside the model's vocabulary of {vocab}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the event loop itself keeps no strong reference
        task.add_done_callback(self._tasks.discard)

    async def _shelter(self, jobs: list[Job]) -> None:
        """Queue jobs again once an engine is in service."""
        try:
            await self._router.wait(self._timeout)
        except EngineError as error:
            for job in jobs:
                job.fail(error)
        self._queue(jobs)

    # -- one call ------------------------------------------------------------------------------------------------

    async def _send(self, route: Route, jobs: list[Job]) -> None:
        """Consumes jobs; produces completions, or queues the jobs again."""
        address = route.address
        try:
            try:
                assert route.call is not None
                for job in jobs:
                    self._name(job)
                body = wire.generate([job.rest() for job in jobs], [job.rid for job in jobs], self._caches(jobs))
                replies = await route.call.post("/generate", body, self._timeout)
            finally:
                self._router.done(route, len(jobs))
                for job in jobs:
                    self._rids.discard(job.rid)
                    job.rid = ""
            await self._settle(route.worker, jobs, replies, wire.parts_of(address)[1])
        except Declined as error:
            await self._declined(route, jobs, error)
        except (EngineError, WorkerDied) as error:
            self._router.out(route, address, str(error))
            if isinstance(error, Silent):
                with suppress(WorkerDied):  # the router hears of it when it asks for the address
                    await route.worker.call("restart", address, str(error), timeout=ANSWER_S)
            await self._again(jobs, error, route)
        except Exception as error:  # not a task's to keep: whoever waits must hear of it
            for job in jobs:
                job.fail(error)

    def _name(self, job: Job) -> None:
        """Give a job a name that it has not had, and that no other of this client has now.

        Raises Declined, as the server does when another client uses it.
        """
        names = (wire.rid(job.request.id, (job.tries + i) % wire.MOST_TRIES) for i in range(wire.MOST_TRIES))
        name = next((name for name in names if name not in self._rids), None)
        if name is None:
            raise Declined(f"more than {wire.MOST_TRIES} requests at once are called {job.request.id}")
        job.rid = name
        self._rids.add(name)

    async def _declined(self, route: Route, jobs: list[Job], error: Declined) -> None:
        """One bad request is enough for a whole call to be declined: then each group is asked for alone."""
        if error.status in TRANSIENT or "Duplicate request ID" in str(error):
            await self._again(jobs, error, route)
        elif len({job.group for job in jobs}) > 1:
            for job in jobs:
                job.alone = True
            self._queue(jobs)
        else:
            ids = ", ".join(job.request.id for job in jobs)
            for job in jobs:
                job.fail(EngineError(f"requests {ids} cannot be answered: {error}"))

    async def _again(self, jobs: list[Job], error: Exception, route: Route | None = None) -> None:
        """Queue jobs that failed, at ``route``, once more, after a while; fail those that failed too often."""
        for job in jobs:
            job.tries += 1
            if route:
                job.shunned.add(route)
            if job.tries == wire.MOST_TRIES:
                job.fail(EngineError(f"request {job.request.id} failed {job.tries} times, at last: {error}"))
        await asyncio.sleep(FIRST_WAIT_S * 2 ** (jobs[0].tries - 1))
        self._queue(jobs)

    async def _settle(self, worker: Worker, jobs: list[Job], replies: Any, mark: str) -> None:
        """Give the jobs what the server wrote for them. Raises EngineError before any of them got something."""
        try:
            pairs = list(zip(jobs, replies, strict=True))
            parts = [wire.completion(job.rest(), reply, mark) for job, reply in pairs]
            stopped = [
                (job, wire.version_of(reply["meta_info"]["weight_version"], mark))
                for (job, reply), part in zip(pairs, parts, strict=True)
                if part.finish == "abort"
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"the server gave a reply that cannot be read: {error!r}") from error
        wanted: list[bool] = []
        if stopped:
            question = [(job.request.id, version) for job, version in stopped]
            wanted = await worker.call("aborted", question, timeout=ANSWER_S)
        cut = {job: version for (job, version), asked in zip(stopped, wanted, strict=True) if not asked}
        for job, part in zip(jobs, parts, strict=True):
            job.add(part)
            if job not in cut:
                job.finish()
        idle = [job for job, version in cut.items() if not job.part.tokens and job.cut_at == version]
        for job, version in cut.items():
            job.cut_at = version
        self._queue([job for job in cut if job not in idle])
        if idle:  # one version ends once
            await self._again(idle, EngineError("the server aborts it before its first token, and not for an update"))


class StreamingClient(SGLangClient):
    """Asks for what each call of ``generate`` wants by itself, so that no group waits for the stragglers of another.

    Not for each request: what is wanted together is of use once all of it is there, and costs the server one body to
    read.
    """

    def _apart(self, jobs: list[Job]) -> list[list[Job]]:
        parts: dict[int, list[Job]] = {}
        for job in jobs:
            parts.setdefault(job.asked, []).append(job)
        return list(parts.values())


class KeepingClient(StreamingClient):
    """What an update cuts short finds its keys and values again, which the server forgets no more.

    They are of old weights, so nobody else may find them: they are shared within one call of ``generate``, and a later
    one reads its prompts by the weights of then.
    """

    def __init__(self, workers: list[Worker], timeout_s: float) -> None:
        super().__init__(workers, timeout_s)
        self._mark = secrets.token_hex(4)  # other clients count their calls too

    def _caches(self, jobs: list[Job]) -> list[str] | None:
        return [f"{self._mark}.{job.asked}" for job in jobs]
