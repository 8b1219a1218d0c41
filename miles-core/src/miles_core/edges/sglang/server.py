"""The engine: a stock SGLang server, and the process that starts it, watches it and gives it weights."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from time import monotonic
from typing import Any

from ..protocols import EngineError, TransportError
from . import wire
from .calls import Silent, Unreachable
from .launch import Live, launch
from .process import own_address
from .proof import Proof, checksums
from .turns import Turns
from .update import GIVEN_UP, Update, halt, unpin
from .use import Use, requests

STARTS = 3  # of a successor, which may have to wait for the memory of the server that was killed
AGAIN_S = 2.0  # between two of them
LOOK_S, PULSE_S = 1.0, 10.0  # between two looks at the process; between two questions to its scheduler
ABORT_S = 3.0  # to close an update in which nothing was changed, before the server is replaced all the same
FORGET = "/flush_cache?timeout=5"  # what was computed of any prompt, once nothing is in flight, by then


class SGLangEngine:
    """Answers what the local engine answers; tokens alone go past it, from the server to whoever asks for them.

    Construct it and call it in one event loop. The constructor returns while the server still starts; what goes wrong
    then is raised, as EngineError with the server's last words, by the first call that needs it.

    Weights are served whole or not at all. An update stops the server first, and new requests wait in it until the
    update is over. A server whose update was cut short is killed: its weights are of no version. One that dies or
    does not answer is replaced. The successor holds the model on disk, which is version 0, and serves nothing until a
    whole update arrived, unless version 0 is what was served.
    """

    def __init__(
        self,
        words: tuple[str, ...],
        start_timeout_s: float,
        timeout_s: float,
        backend: str = "nccl",
        vocab: int = 0,
        turns: bool = False,
        may_stay: bool = True,
        keeps: bool = False,
        hang_s: float = 60.0,
        command: tuple[str, ...] = (),
        host: str = "",
    ) -> None:
        """``words`` are the server's arguments, all but those for its address and the version of its weights.

        ``start_timeout_s``: for the server to start and to load its weights. ``timeout_s``: to load a bucket, or all
        that a rank broadcasts in an update, or to meet the others of a group. ``backend`` of these groups. ``vocab``:
        tokens the model has, 0 when that is not known. ``turns``: trainers use the same GPUs; the server has no memory
        there from ``sleep`` on, and takes it again as weights arrive, but where both fit and it ``may_stay``.
        ``keeps``: keys and values of old weights stay, for who asks by a name of his own (see ``wire.generate``).
        ``hang_s``: a scheduler that says nothing for so long, though it was told to do nothing long, hangs. ``command``
        starts a server with ``miles_core``, if not the stock one of this interpreter; ``host`` is where it listens.
        """
        self._command = (*(command or (sys.executable, "-m", "sglang.launch_server")), *words)
        self._host, self._backend, self._vocab = host or own_address(), backend, vocab
        self._start_timeout, self._timeout, self._hang = start_timeout_s, timeout_s, hang_s
        self._version = self._restarts = self._busy = 0  # busy: calls under way that may take long
        self._refusal, self._paused = "", False  # why no request may be served; whether it was told to write nothing
        self._update: Update | None = None  # that is under way
        self._beginning, self._cutting = asyncio.Lock(), asyncio.Lock()  # an update; requests that are in flight then
        self._turns, self._use, self._keeps = Turns(turns, may_stay), Use(), keeps
        self._disk: dict[str, str] | None = None  # checksums of the model it started with, if it has any
        self._groups: dict[str, Live] = {}  # those it joined, and with which server
        self._aborted: dict[str | None, int] = {}  # what was to be aborted (None: everything), and at which version
        self._starting = asyncio.ensure_future(self._start(tries=1))
        self._watching = asyncio.ensure_future(self._watch())

    # -- sampling ------------------------------------------------------------------------------------------------

    async def address(self) -> str:
        """Where to send requests: a URL, with a mark behind # that every reply must carry (see ``wire.stamp``). Answers
        at once. Raises EngineError with the reason when the engine serves nothing now."""
        if not self._starting.done():
            raise EngineError(f"its server is starting{f'; {self._refusal}' if self._refusal else ''}")
        live = self._starting.result()
        if self._refusal:
            raise EngineError(self._refusal)
        return live.address

    async def vocab(self) -> int:
        """Tokens the model has, 0 when that is not known. A prompt with another one kills the server."""
        return self._vocab

    async def abort(self, ids: list[str] | None) -> None:
        """Complete these requests, or all, with finish "abort" and the tokens they have. Unknown ids are ignored."""
        live = await self._live()
        for id in [None] if ids is None else ids:
            self._aborted[id] = self._version
        await unpin(live.call, self._paused)
        if ids is None:
            await live.call.repeat("/abort_request", {"abort_all": True})
            return
        rids = [wire.rid(id, attempt) for id in ids for attempt in range(wire.MOST_TRIES)]
        await asyncio.gather(*(live.call.repeat("/abort_request", {"rid": rid}) for rid in rids))

    async def aborted(self, requests: list[tuple[str, int]]) -> list[bool]:
        """Of each request that came back aborted, by its id and the version of the weights then: whether ``abort``
        asked for it. Any other was cut short by an update, and is to go on as a new request, now that all are."""
        async with self._cutting:
            pass
        return [version in (self._aborted.get(id, -1), self._aborted.get(None, -1)) for id, version in requests]

    async def pause(self) -> None:
        """Write no token until ``resume``; requests are still taken."""
        live = await self._live()
        self._paused = True
        if self._update is None:
            await live.call.repeat("/pause_generation", {"mode": "in_place"})

    async def resume(self) -> None:
        live = await self._live()
        self._paused = False
        if self._update is None:
            await self._go_on(live)

    async def health(self) -> dict[str, Any]:
        """``version``, requests ``running`` and ``waiting``, ``restarts`` so far, SGLang's own ``release``. ``refuses``
        says why nothing is served now, or is empty; ``stale`` is true when only whole weights help."""
        state = {"version": self._version, "running": 0, "waiting": 0, "restarts": self._restarts, "release": ""}
        state |= {"refuses": "its server is starting", "stale": bool(self._refusal)}
        if not self._starting.done():
            return state
        try:
            live = self._starting.result()
            return state | await requests(live.call) | {"release": live.release, "refuses": self._refusal}
        except EngineError as error:
            return state | {"refuses": str(error)}

    # -- weights -------------------------------------------------------------------------------------------------

    async def sleep(self) -> bool:
        """Begin the update behind a training, for which it gives its memory up; False, at once, where both fit."""
        return self._turns.gives and await self._begin()

    async def begin_update(self, version: int) -> str:
        """Stop writing tokens, and expect every tensor of ``version`` of the model, through ``load``. Returns which
        server they go to: one that took its place has another name, and is in no group.

        Waits for a server that is starting. Requests in flight wait too and go on with the new weights, or come back
        aborted (see ``aborted``): from 0.5.16, and from any server that keeps what the old weights computed for them.
        Where trainers use the same GPUs its memory is theirs until the first ``load``, unless both fit: see ``stay``.
        """
        await self._begin()
        return self._updating(GIVEN_UP).expect(version)

    async def _begin(self) -> bool:
        """False where an update had begun already."""
        async with self._beginning:
            live = await self._live()
            if self._update:
                if self._update.live is live:
                    return False
                self._update.end()  # of the server before this one
            self._use.halt()
            try:
                await halt(live, self._paused, self._keeps, self._cutting, self._timeout)
            except Unreachable:
                if words := await live.last_words():  # whoever tries again is to wait for its successor
                    self._replace(live, f"its server died{words}")
                raise
            gives = self._turns.begin()
            await (self.release(["kv_cache", "weights"]) if gives else self._open(live))
            self._update = Update(live, not (gives or self._keeps), self._wake if gives else None)
            return True

    async def load(self, bucket: wire.Tensors) -> dict[str, int]:
        """Have the server load a bucket, after those that came before, which need not be loaded yet. Returns no
        checksums: it has none of tensors as they were sent. Raises TransportError with what is wrong."""
        if not self._update and bucket.load_format == wire.RECEIVE and self._groups:
            self._replace(await self._live(), "weights were sent to it outside an update")  # and began to arrive
        update = self._updating("weights arrived outside an update; call begin_update first")
        try:
            await update.load(bucket, self._timeout)
        except EngineError as error:
            raise TransportError(f"the SGLang server did not load a bucket: {error}") from error
        return {}

    async def prove(self) -> None:
        """Before the first ``load``: have ``end_update`` find out whether all weights arrived; see ``proof``."""
        self._updating("a proof outside an update; call begin_update first").prove(self._checker)

    async def take_turn(self) -> None:
        """Wait until no other rank sends. Where several ranks send to several engines, each asks the first engine."""
        await self._updating("a rank's turn to send outside an update; call begin_update first").take_turn()

    async def end_turn(self) -> None:
        if self._update:
            self._update.end_turn()

    async def stay(self, room: int) -> bool:
        """Whether it keeps its memory from the next ``begin_update`` on, as ``Turns.stay`` decides by ``room``."""
        return self._turns.stay(room, (await self._live()).size)

    async def _wake(self) -> None:
        await self.restore(["weights"])
        await self._open(await self._live())
        self._turns.asleep = False

    async def _open(self, live: Live) -> None:
        if live.sessions:
            await live.call.post("/begin_weight_update", {"selector": "all"})

    async def end_update(self) -> float:
        """Serve the new weights; returns ``Use.share``. Version 0 is the model on disk, and must leave every tensor as
        it was when the server started. Raises TransportError when it does not, when a tensor or all did not arrive, or
        when the server refuses.
        """
        update = self._updating("end_update without begin_update")
        if not update.loads:
            raise TransportError("no weights arrived between begin_update and end_update")
        try:
            if update.live.sessions:
                await self._long(update.live, "/end_weight_update")
            await (update.proof or Proof(self._checker)).end(None if update.version else self._disk)
            if self._turns.slept:
                await self.restore(["kv_cache"])
            if not self._paused:
                await self._go_on(update.live)
        except EngineError as error:
            raise TransportError(f"the SGLang server did not end the update: {error}") from error
        self._aborted = {id: at for id, at in self._aborted.items() if at == self._version}
        self._version, self._update, self._refusal = update.version, None, ""
        update.end()
        return self._use.share()

    async def abort_update(self) -> None:
        """Give up an update. A server whose weights were partly overwritten is replaced; returns at once."""
        update, self._update = self._update, None
        if not update:
            return
        update.end()
        if self._is_current(live := update.live) and not update.touched:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    if live.sessions:
                        await live.call.post("/end_weight_update")
                    if not self._paused:
                        await self._go_on(live)
                return
        self._replace(live, "an update of its weights was cut short", stale=update.touched)

    async def join(self, address: str, port: int, rank_offset: int, world: int, name: str) -> None:
        """Enter the group ``name`` of ``world`` ranks that meets at ``address``, as ranks ``rank_offset`` and up.
        Returns once all of them are there. A server that was replaced is in no group any more."""
        body = {"master_address": address, "master_port": port, "rank_offset": rank_offset, "world_size": world}
        live = await self._live()
        await self._long(live, "/init_weights_update_group", body | {"group_name": name, "backend": self._backend})
        self._groups[name] = live

    async def leave(self, name: str) -> None:
        if self._groups.pop(name, None) is (live := await self._live()):  # else that server is gone
            await live.call.post("/destroy_weights_update_group", {"group_name": name})

    async def checksums(self) -> dict[str, str]:
        """A hash of each parameter and buffer; see ``proof``. 0.5.16 has none without a GPU: raises EngineError."""
        return checksums(await self._checker("checksum"))

    async def _checker(self, action: str) -> Any:
        return await self._long(await self._live(), "/weights_checker", {"action": action})

    async def ready(self) -> str:
        """Wait for the server. Returns what it has, in words."""
        live = await self._live()
        if self._disk is None:  # once: later its weights are others, or its memory is a trainer's
            self._disk = {}
            with suppress(EngineError):  # 0.5.16 has no checksums without a GPU
                self._disk = await self.checksums()
        return live.has()

    # -- memory --------------------------------------------------------------------------------------------------

    async def release(self, tags: list[str]) -> None:
        """Free the memory of "weights", "kv_cache" or "cuda_graph": what was in it is lost. Raises EngineError while
        requests are in flight."""
        live = await self._live()
        await live.call.repeat(FORGET)  # the server ends itself when it is asked this while it works
        await self._long(live, "/release_memory_occupation", {"tags": tags})

    async def restore(self, tags: list[str]) -> None:
        """Take that memory again; weights must be loaded into it, the KV cache is empty."""
        await self._long(await self._live(), "/resume_memory_occupation", {"tags": tags})

    # -- the server ----------------------------------------------------------------------------------------------

    async def restart(self, address: str, why: str) -> None:
        """Replace the server if it still is the one at ``address``: whoever asked it for tokens got no answer."""
        live = self._starting.result() if self._starting.done() and not self._starting.exception() else None
        if live and live.address == address:
            self._replace(live, why)

    async def close(self) -> None:
        """End the server, and wait until it is gone."""
        self._watching.cancel()
        self._starting.cancel()
        with suppress(asyncio.CancelledError, EngineError):
            await (await self._starting).end()

    async def _live(self) -> Live:
        """The server, once it is up. Raises EngineError with the reason when it is not."""
        return await asyncio.shield(self._starting)

    def _is_current(self, live: Live) -> bool:
        started = self._starting
        return started.done() and not started.exception() and started.result() is live

    def _updating(self, otherwise: str) -> Update:
        """The update under way; TransportError when none is."""
        if self._update is None:
            raise TransportError(otherwise)
        if not self._is_current(self._update.live):
            raise TransportError(f"the server was replaced in the middle of the update; {self._refusal}")
        return self._update

    async def _go_on(self, live: Live) -> None:
        # By default this would also give memory back to the driver, which takes longer than the rest of an update.
        await live.call.repeat("/continue_generation", {"torch_empty_cache": False})

    async def _long(self, live: Live, path: str, body: dict[str, Any] | None = None) -> Any:
        """A call during which the scheduler may rightly be silent. Never repeated: it may have been obeyed."""
        self._busy += 1
        try:
            return await live.call.post(path, body, timeout=self._timeout)
        finally:
            self._busy -= 1

    async def _start(self, tries: int, old: Live | None = None) -> Live:
        """Produces a server, once ``old`` is gone. Raises what the last of ``tries`` raised."""
        if old:
            await old.end()
        while True:
            tries -= 1
            try:
                live = await launch(self._command, self._host, self._start_timeout)
            except EngineError:
                if not tries:
                    raise
                await asyncio.sleep(AGAIN_S)
                continue
            if self._paused:
                await live.call.repeat("/pause_generation", {"mode": "in_place"})
            return live

    def _replace(self, old: Live, why: str, stale: bool = False) -> None:
        """Kill a server now, and start its successor behind the caller's back, unless that has happened already.

        ``stale``: the successor's weights are not those that the engine should have, even if that is version 0.
        """
        if not self._is_current(old):
            return
        old.process.stop()
        self._restarts += 1
        if stale or self._version or self._refusal:
            self._refusal = f"{why}; its successor serves nothing until whole weights arrive"
        print(f"the SGLang server at {old.url} is replaced: {why}", flush=True)
        # Begun at once: however soon the engine is closed, it waits until the old server is gone.
        self._starting = asyncio.Task(self._start(STARTS, old), loop=asyncio.get_running_loop(), eager_start=True)

    async def _watch(self) -> None:
        """Consumes servers that came up; has each replaced that dies or hangs. Ends with the engine."""
        while True:
            with suppress(EngineError):  # one that never came up: whoever calls hears of it
                live = await self._live()
                self._replace(live, await self._unwell(live))
            await asyncio.sleep(LOOK_S)

    async def _unwell(self, live: Live) -> str:
        """Returns what is wrong, once something is or the server was replaced.

        The question asked is one that the scheduler answers and that makes it compute nothing: ``/health`` would have
        it generate a token, perhaps in memory that was released.
        """
        asked = monotonic()
        while self._is_current(live):
            with suppress(TimeoutError):
                await asyncio.wait_for(live.process.ended.wait(), LOOK_S)
            if not live.process.alive:
                return f"its server died{live.process.last_words()}"
            if self._update or self._busy:
                continue
            await self._use.look(live.call)
            if monotonic() - asked < min(PULSE_S, self._hang):
                continue
            try:
                await live.call.get("/server_info", timeout=self._hang)
            except (Silent, Unreachable) as error:
                if not (self._update or self._busy):
                    return f"its server hangs: {error}"
            asked = monotonic()
        return ""
