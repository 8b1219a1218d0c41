"""What SGLang calls the scheduler, with a model of two weights whose tokens show what they were computed from."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any

MIXED, STALE_CACHE, STALE_PREFIX = 1, 2, 3  # tokens that no sound server writes
FIRST, VOCAB = 10, 50
SHOWN = 4  # tokens between two reports of an unfinished request to the tokenizer manager; 50 there


class Declined(ValueError):
    """Answered with status 400 and the message."""


def token_of(sequence: list[int], version: int) -> int:
    """What follows prompt and tokens so far, by whole weights of ``version``."""
    return FIRST + (3 * sequence[-1] + 5 * len(sequence) + 7 * version) % (VOCAB - FIRST)


def logprob_of(sequence: list[int], version: int, temperature: float) -> float:
    return -(0.25 + (len(sequence) % 8) / 16 + version / 4) / (temperature or 1.0)


def common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(eq=False)
class Request:
    rid: str
    prompt: list[int]
    params: dict[str, Any]
    mask: bool
    done: asyncio.Future[None]
    key: str | None = None  # extra_key: whose cache it shares
    found: int = 0  # tokens of the prompt that were in it
    written: list[tuple[int, float]] = field(default_factory=list)
    cached: tuple[int, ...] = ()  # the weights by which its keys and values were computed; () for none
    changes: list[tuple[str, int]] = field(default_factory=list)  # (version before it, tokens then)
    finish: dict[str, Any] = field(default_factory=dict)
    unborn: bool = False  # aborted in the waiting queue
    aborting: bool = False
    seen: list[tuple[int, float]] = field(default_factory=list)  # what the tokenizer manager was told of

    def verify(self, context: int) -> None:
        most = self.params["max_new_tokens"]
        if len(self.prompt) + most > context:
            raise Declined(f"Requested token count exceeds the model's maximum context length of {context} tokens.")
        if not (self.params["top_k"] == -1 or self.params["top_k"] >= 1):
            raise Declined(f"top_k must be -1 (disable) or at least 1, got {self.params['top_k']}.")
        if self.mask and not 1 <= self.params["top_k"] <= 4096:
            raise Declined("return_sampling_mask requires top_k=1 for greedy sampling or finite 1 < top_k <= 4096.")

    def end(self, finish: dict[str, Any]) -> None:
        self.finish = finish
        if not self.done.done():
            self.done.set_result(None)

    def spans(self, version: str) -> list[dict[str, Any]]:
        spans: list[dict[str, Any]] = []
        for name, end in [*self.changes, (version, len(self.seen))]:
            start = spans[-1]["end"] if spans else 0
            if end > start or not spans:
                spans.append({"version": name, "start": start, "end": end})
        return spans


class Scheduler:
    def __init__(self, sessions: bool, step_s: float, most: int) -> None:
        self.sessions, self.step_s, self.most = sessions, step_s, most
        self.weights = {"a": 0, "b": 0}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.prefixes: dict[tuple[int, ...], tuple[int, ...]] = {}  # the radix cache: by which weights
        self.named: dict[str, list[list[int]]] = {}  # the same of requests with a key: what they had read and written
        self.paused = False
        self.session: int | None = None  # weights loaded in it
        self.groups: set[str] = set()
        self.released: set[str] = set()
        self.dies_at, self.tokens = 0, 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self.paused:
                self.step()

    def step(self) -> None:
        if (self.waiting or self.running) and self.released:
            os._exit(1)  # an illegal memory access
        now = tuple(self.weights.values())
        room = max(self.most - len(self.running), 0)
        starting, self.waiting = self.waiting[:room], self.waiting[room:]
        for request in starting:
            request.cached = now
            if request.key:
                read = self.named.get(request.key, [])
                request.found = max((common(known, request.prompt[:-1]) for known in read), default=0)
            if not all(0 <= token < VOCAB for token in request.prompt):
                os._exit(1)  # an index error, or an assertion on the GPU
        self.running += starting
        for request in list(self.running):
            self.write(request, now)
            stops, params = set(request.params.get("stop_token_ids") or ()), request.params
            token = request.written[-1][0]
            if request.aborting:
                self.leave(request, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})
            elif token in stops and not params.get("ignore_eos"):
                self.leave(request, {"type": "stop", "matched": token})
            elif len(request.written) >= params["max_new_tokens"]:
                self.leave(request, {"type": "length", "length": params["max_new_tokens"]})
            elif len(request.written) % SHOWN == 0:
                request.seen = list(request.written)

    def write(self, request: Request, now: tuple[int, ...]) -> None:
        sequence, version = request.prompt + [token for token, _ in request.written], now[0]
        token = token_of(sequence, version)
        if now[0] != now[1]:
            token = MIXED
        elif request.cached != now:
            token = STALE_CACHE
        elif not request.key and self.prefixes.setdefault(tuple(request.prompt), now) != now:
            token = STALE_PREFIX
        request.written.append((token, logprob_of(sequence, version, request.params["temperature"])))
        self.tokens += 1
        if self.tokens == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, request: Request, finish: dict[str, Any]) -> None:
        self.running.remove(request)
        if request.key:
            tokens = [token for token, _ in request.written]
            self.named.setdefault(request.key, []).append(request.prompt + tokens)
        request.seen = request.written
        request.end(finish)

    def abort(self, rid: str, everything: bool) -> None:
        """By the beginning of the id. What runs is done with its next token; what waits, at once."""
        chosen = [r for r in (*self.running, *self.waiting) if everything or r.rid.startswith(rid)]
        for request in chosen:
            if request in self.running:
                request.aborting = True
            else:
                self.waiting.remove(request)
                request.unborn = True
                request.end({"type": "abort", "message": "Abort in waiting queue"})

    def pause(self, mode: str) -> None:
        assert mode in ("in_place", "retract")
        self.paused = True
        if mode == "retract":
            self.waiting += self.running
            self.running = []

    def idle(self) -> bool:
        """0.5.16 counts requests that wait, also those that a pause sent back."""
        return not self.running and (not self.waiting or (self.sessions and self.paused))

    def flush(self) -> bool:
        if not self.idle():
            return False
        self.prefixes.clear()
        self.named.clear()
        return True

    def load(self, weights: dict[str, int], body: dict[str, Any], fail: str | None) -> tuple[bool, str]:
        if fail == "die":
            os._exit(1)
        for name, value in weights.items():
            if name not in self.weights:
                os._exit(1)  # a KeyError in the scheduler's process
            self.weights[name] = value
            if fail:
                return False, "Failed to update parameter online: fault. Please discard the whole weights."
        if self.sessions:
            assert self.session is not None
            self.session += len(weights)
        if body.get("flush_cache", True) and not self.flush():
            os._exit(1)  # an assertion in 0.5.16
        return True, "Success"

    def note_version(self, old: str) -> None:
        for request in (*self.running, *self.waiting):
            if request.written:
                request.changes.append((old, len(request.written)))

    def begin(self) -> tuple[bool, str]:
        if self.session is not None:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session = 0
        return True, "Success"

    def end(self) -> tuple[bool, str]:
        if self.session is None:
            return False, "no weight-update session is open; call begin_weight_update() first"
        self.session = None
        return True, "Success"

    def memory(self, release: bool, tags: list[str]) -> None:
        if release and not self.idle():
            os._exit(1)  # an assertion
        for tag in tags:
            if release:
                self.released.add(tag)
                if tag == "weights":
                    self.weights = {"a": -1, "b": -2}
            else:
                self.released.remove(tag)
