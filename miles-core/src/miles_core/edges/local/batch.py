"""Continuous batching: which requests are being decoded, in which rows, and what each has so far."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..protocols import Completion, EngineError, Request
from .model import Decoder
from .sampler import Sampler

Finish = Literal["stop", "length", "abort"]
PREFILL_TOKENS = 4096  # most (padded) prompt tokens computed between two looks at who calls
LOGITS = 2**24  # most logits held at once: 64 MiB


@dataclass(eq=False, slots=True)
class Row:
    """One request in flight."""

    request: Request
    prompt: tuple[int, ...]
    limit: int  # tokens it may get: max_tokens, or what the context leaves
    stops: frozenset[int]
    future: asyncio.Future[Completion]
    place: int = -1  # its row in the batch; -1 while it waits
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)  # (version, how many tokens came before it)

    def complete(self, finish: Finish) -> None:
        """Answer whoever waits for this request, with what there is."""
        if self.future.done():  # they gave up
            return
        ends = [start for _, start in self.versions[1:]] + [len(self.tokens)]
        by_token = [v for (v, start), end in zip(self.versions, ends, strict=False) for _ in range(end - start)]
        self.future.set_result(Completion(self.tokens, self.logprobs, by_token, finish))

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True)
class Prompt:
    """A prompt whose keys and values are in the rows of ``holders``, and what the model made of its last token."""

    state: Tensor  # [hidden]
    version: int
    holders: list[Row]


class Batch:
    """Rows 0 to n - 1 are being decoded; the rest of the requests wait, in order of arrival.

    Every call leaves the batch whole, so that between two of them requests may be added or aborted and weights may
    change. Requests with equal prompts share one prefill, also when some of them have to wait for a row.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.generated = 0  # tokens, since the engine started
        self._decoder, self._sampler = decoder, Sampler(decoder.rows)
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._tokens, self._positions = np.zeros(decoder.rows, np.int64), np.zeros(decoder.rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows) + len(self.waiting)

    def add(self, request: Request) -> asyncio.Future[Completion]:
        """Queue a request. Raises EngineError, naming it, when the model cannot answer it."""
        size, context, vocab = len(request.tokens), self._decoder.context, self._decoder.arch.vocab
        if not size:
            raise EngineError(f"request {request.id}: no prompt tokens")
        if size >= context:
            raise EngineError(
                f"request {request.id}: {size} prompt tokens leave no room in a context of {context}; shorten the "
                "prompt or raise model.context"
            )
        if not (0 <= min(request.tokens) and max(request.tokens) < vocab):
            wrong = next(token for token in request.tokens if not 0 <= token < vocab)
            raise EngineError(f"request {request.id}: token {wrong} is outside the model's vocabulary of {vocab}")
        sampling = request.sampling
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        limit = min(sampling.max_tokens, context - size)
        row = Row(request, tuple(request.tokens), limit, frozenset(sampling.stop_tokens), future)
        if limit < 1:
            row.complete("length")
        else:
            self.waiting.append(row)
        return future

    def step(self, version: int) -> None:
        """Let waiting requests in, and write one token of every row, with the weights of ``version``."""
        with torch.inference_mode():
            self._drop([(row, None) for row in self.rows if row.future.done()])
            if self.rows:
                self._decode(version)
            self._admit(version)

    def abort(self, ids: set[str] | None) -> None:
        """Complete these requests, or all of them, with what they have."""
        chosen = [row for row in (*self.rows, *self.waiting) if ids is None or row.request.id in ids]
        for row in chosen:
            if row.place < 0:
                self.waiting.remove(row)
                row.complete("abort")
        with torch.inference_mode():
            self._drop([(row, "abort") for row in chosen if row.place >= 0])

    def retract(self) -> None:
        """Have every row wait again, before all others: its prompt and what was written are computed anew."""
        for row in reversed(self.rows):
            row.place, row.prompt = -1, (*row.request.tokens, *row.tokens)
            self.waiting.appendleft(row)
        self.rows.clear()
        self._prompts.clear()

    def fail(self, error: Exception) -> None:
        """Give up every request, and forget what was computed for them."""
        for row in (*self.rows, *self.waiting):
            row.fail(error)
        self.rows.clear()
        self.waiting.clear()
        self._prompts.clear()
        self._decoder.clear()

    # -- one step ------------------------------------------------------------------------------------------------

    def _decode(self, version: int) -> None:
        n = len(self.rows)
        positions = self._positions[:n]
        positions += 1
        states = self._decoder.decode(
            torch.from_numpy(self._tokens[:n]), torch.from_numpy(positions), int(positions.min()), int(positions.max())
        )
        self._sample(states, self.rows[:], version)

    def _admit(self, version: int) -> None:
        """Give rows to requests that wait, when enough rows are free to be worth a pass over the weights."""
        free = self._decoder.rows - len(self.rows)
        if not self.waiting or free < min(len(self.waiting), 1 + self._decoder.rows // 16):
            return
        fresh: dict[tuple[int, ...], Row] = {}  # the first row of each prompt that must be computed
        arrived: list[Row] = []
        longest = 0
        while self.waiting and len(arrived) < free:
            row = self.waiting[0]
            if row.future.done():
                self.waiting.popleft()
                continue
            known = self._prompts.get(row.prompt)
            if row.prompt not in fresh and (known is None or known.version != version):
                longest = max(longest, len(row.prompt))
                if fresh and longest * (len(fresh) + 1) > PREFILL_TOKENS:
                    break
                fresh[row.prompt] = row
            self.waiting.popleft()
            row.place = len(self.rows)
            self.rows.append(row)
            arrived.append(row)
        if not arrived:
            return
        if fresh:
            states = self._decoder.prefill([list(p) for p in fresh], [row.place for row in fresh.values()])
            for prompt, row, state in zip(fresh, fresh.values(), states, strict=True):
                self._prompts[prompt] = Prompt(state, version, [row])
        self._share([row for row in arrived if fresh.get(row.prompt) is not row])
        self._enter(arrived)
        self._sample(torch.stack([self._prompts[row.prompt].state for row in arrived]), arrived, version)

    def _enter(self, rows: list[Row]) -> None:
        """Note where new rows stand, which follow one another, and how they want to be sampled."""
        first, last = rows[0].place, rows[-1].place
        self._positions[first : last + 1] = [len(row.prompt) - 1 for row in rows]
        requests = [row.request for row in rows]
        samplings, seeds = [request.sampling for request in requests], [request.seed for request in requests]
        self._sampler.put(first, samplings, seeds, [len(row.tokens) for row in rows])

    def _share(self, rows: list[Row]) -> None:
        """Copy prompts that another row has already."""
        if rows:
            holders = [self._prompts[row.prompt].holders for row in rows]
            sources = [holding[0].place for holding in holders]
            self._decoder.copy(sources, [row.place for row in rows], max(len(row.prompt) for row in rows))
            for row, holding in zip(rows, holders, strict=True):
                holding.append(row)

    def _sample(self, states: Tensor, rows: list[Row], version: int) -> None:
        """Write the next token of ``rows``, which stand side by side, from their states [n, hidden]."""
        first = rows[0].place
        most = max(1, LOGITS // self._decoder.arch.vocab)
        parts = [
            self._sampler.draw(self._decoder.head(part), first + i * most)
            for i, part in enumerate(torch.split(states, most))
        ]
        tokens, logprobs = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
        self._tokens[first : first + len(rows)] = tokens.numpy()
        values = logprobs.tolist()
        if not math.isfinite(sum(values)):
            bad = next(row for row, value in zip(rows, values, strict=True) if not math.isfinite(value))
            raise EngineError(f"request {bad.request.id}: the model's logits are not finite; weights version {version}")
        finished: list[tuple[Row, Finish | None]] = []
        for row, token, value in zip(rows, tokens.tolist(), values, strict=True):
            if not row.versions or row.versions[-1][0] != version:
                row.versions.append((version, len(row.tokens)))
            row.tokens.append(token)
            row.logprobs.append(value)
            if token in row.stops:
                finished.append((row, "stop"))
            elif len(row.tokens) == row.limit:
                finished.append((row, "length"))
        self.generated += len(rows)
        self._drop(finished)

    def _drop(self, finished: list[tuple[Row, Finish | None]]) -> None:
        """Complete rows and close the holes they leave with the rows from the end. None: nobody wants the answer."""
        if not finished:
            return
        for row, finish in finished:
            if finish is not None:
                row.complete(finish)
            prompt = self._prompts.get(row.prompt)
            if prompt is not None and row in prompt.holders:  # else it is of older weights, and was replaced
                prompt.holders.remove(row)
                if not prompt.holders:
                    del self._prompts[row.prompt]
        gone = {row.place for row, _ in finished}
        left = len(self.rows) - len(gone)
        holes = sorted(place for place in gone if place < left)
        movers = [row for row in self.rows[left:] if row.place not in gone]
        if holes:
            sources = [row.place for row in movers]
            self._decoder.copy(sources, holes, int(self._positions[sources].max()) + 1)
            self._sampler.move(sources, holes)
            for array in (self._tokens, self._positions):
                array[holes] = array[sources]
            for row, place in zip(movers, holes, strict=True):
                row.place, self.rows[place] = place, row
        del self.rows[left:]
