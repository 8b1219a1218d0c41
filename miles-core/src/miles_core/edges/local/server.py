"""The engine: one process that holds the weights, samples for whoever calls, and takes new weights in place."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from ...pacing import Watch
from ..protocols import Bucket, Completion, EngineError, Piece, Request, TransportError
from . import rows_of
from .architecture import architecture, read_config
from .batch import Batch
from .model import Decoder
from .segments import attached
from .weights import Weights


class LocalEngine:
    """Methods run in one event loop; a token step never overlaps with any of them.

    Weights are served whole or not at all: from ``begin_update`` on no token is written until ``end_update`` found
    that every tensor arrived exactly once. Requests wait meanwhile; those in flight go on with the new weights, with
    the keys and values of their older tokens kept, or computed anew where the engine is to ``retract``.
    """

    def __init__(self, path: str, context: int | None, max_batch: int, kv_mib: int, retract: bool = False) -> None:
        """Load the weights of the model folder ``path`` as version 0. Raises EngineError when they are not whole."""
        arch = architecture(read_config(Path(path)))
        context = context or arch.context
        self._weights = Weights(arch)
        self._weights.load(Path(path))
        self._batch = Batch(Decoder(self._weights, max(1, rows_of(arch, context, max_batch, kv_mib)), context))
        self._version = self._next = 0  # that is served, and that of the update which began last
        self._paused = self._updating = False
        self._retract = retract
        self._broken = ""  # why the weights cannot be served
        self._arrived: dict[str, int] = {}  # how often, in this update
        self._turning: asyncio.Task[None] | None = None
        self._watch = Watch(monotonic())

    async def ready(self) -> str:
        """It is, and has nothing to tell of."""
        return ""

    # -- sampling ------------------------------------------------------------------------------------------------

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of ``requests``, once all of them are done.

        Raises EngineError when the engine has no whole weights, or a request cannot be answered: then none of them is.
        """
        if self._broken and not self._updating:
            raise EngineError(self._broken)
        futures: list[asyncio.Future[Completion]] = []
        try:
            for request in requests:
                futures.append(self._batch.add(request))
            self._wake()
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()  # no-op on those that are done; the others' rows are freed at the next step

    async def abort(self, ids: list[str] | None) -> None:
        """Complete these requests, or all, with finish "abort" and the tokens they have. Unknown ids are ignored."""
        self._batch.abort(None if ids is None else set(ids))

    async def pause(self) -> None:
        """Write no token until ``resume``; requests are still taken."""
        self._paused = True

    async def resume(self) -> None:
        self._paused = False
        self._wake()

    async def health(self) -> dict[str, Any]:
        """``version``, whether only whole weights help (``stale``), requests ``running`` and ``waiting``, and
        ``tokens`` written since the engine started."""
        batch = self._batch
        return {
            "version": self._version,
            "stale": bool(self._broken) and not self._updating,
            "running": len(batch.rows),
            "waiting": len(batch.waiting),
            "tokens": batch.generated,
        }

    def _wake(self) -> None:
        if self._turning is None or self._turning.done():
            self._turning = asyncio.get_running_loop().create_task(self._turn())

    async def _turn(self) -> None:
        """Consumes waiting requests; produces tokens, one step after another, and lets callers in between two.

        Ends when nothing is left to do or something holds it; ``generate``, ``resume`` and ``end_update`` start it.
        """
        self._watch.look(monotonic(), 0)
        while self._batch and not (self._paused or self._updating or self._broken):
            try:
                self._batch.step(self._version)
            except EngineError as error:
                self._batch.fail(error)
            except Exception as error:  # not a task's to keep: whoever waits for tokens must hear of it
                failed = EngineError(f"the engine failed in a token step: {type(error).__name__}: {error}")
                failed.__cause__ = error
                self._batch.fail(failed)
            self._watch.look(monotonic(), 1)
            await asyncio.sleep(0)

    # -- weights -------------------------------------------------------------------------------------------------

    async def begin_update(self, version: int) -> str:
        """Stop writing tokens and expect every tensor of ``version`` of the model, through ``load``."""
        if self._retract and not self._updating:
            self._batch.retract()
        self._updating, self._arrived, self._next = True, {}, version
        return ""

    async def load(self, bucket: Bucket) -> dict[str, int]:
        """Copy a bucket's tensors over the weights; crc32 by name, read back from the weights, where one was sent.

        Raises TransportError for a tensor the model does not have, or one of another shape.
        """
        if not self._updating:
            raise TransportError(f"{bucket.segment}: weights arrived outside an update; call begin_update first")
        self._broken = "an update of the engine's weights was cut short; it serves nothing until a whole one arrived"
        with attached(bucket.segment) as memory:
            return self._copy(memory, bucket.pieces)

    def _copy(self, memory: Any, pieces: tuple[Piece, ...]) -> dict[str, int]:
        checksums = {}
        for piece in pieces:
            dtype = getattr(torch, piece.dtype)
            source = torch.frombuffer(memory, dtype=dtype, offset=piece.offset, count=piece.length // dtype.itemsize)
            self._weights.write(piece.name, source.view(piece.shape))
            self._arrived[piece.name] = self._arrived.get(piece.name, 0) + 1
            if piece.checksum is not None:
                back = self._weights.targets[piece.name].read().to(dtype).contiguous()
                checksums[piece.name] = zlib.crc32(back.view(torch.uint8).numpy())
        return checksums

    async def end_update(self) -> float:
        """Serve the new weights; returns the share of the time since the last ones in which it wrote tokens.

        Raises TransportError unless each tensor arrived exactly once.
        """
        if not self._updating:
            raise TransportError("end_update without begin_update")
        missing = [name for name in self._weights.targets if name not in self._arrived]
        twice = [name for name, times in self._arrived.items() if times > 1]
        if missing or twice:
            some = [f"{len(missing)} did not arrive, such as {missing[0]}"] if missing else []
            some += [f"{len(twice)} arrived more than once, such as {twice[0]}"] if twice else []
            raise TransportError(f"of {len(self._weights.targets)} tensors {' and '.join(some)}")
        self._version, self._updating, self._broken = self._next, False, ""
        seen, self._watch = self._watch, Watch(monotonic())
        seen.look(self._watch.at, 0)
        self._wake()
        return seen.busy

    async def abort_update(self) -> None:
        """Give up an update. Weights that were partly overwritten are not served until a whole update arrives."""
        self._updating = False
        if self._broken:
            self._batch.fail(EngineError(self._broken))
        self._wake()
