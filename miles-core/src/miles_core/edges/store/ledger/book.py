"""Where every prompt is, and which moves are legal: the state that the log's records lead to."""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from ...lasting import LedgerError
from .lines import Ids, Line, pack, unpack

NEW, WAITING, WORKER, QUEUE, TRAINER, TRAINED, DROPPED = range(7)
STATES = ("not taken", "waiting", "worker", "queue", "trainer", "trained", "dropped")
MOVES: dict[str, tuple[tuple[int, ...], int, str | None]] = {  # from, to, and the field that says more
    "lease": ((WAITING,), WORKER, "to"),
    "queue": ((WORKER,), QUEUE, None),
    "back": ((WORKER, QUEUE, TRAINER), WAITING, None),
    "drop": ((WORKER, QUEUE), DROPPED, "why"),
    "give": ((QUEUE,), TRAINER, "step"),
    "trained": ((TRAINER,), TRAINED, "step"),
}


class Book:
    """One byte a prompt for its state, eight for the worker, the step or the reason that goes with it."""

    def __init__(self) -> None:
        self.cursor = 0  # the largest id that was taken
        self.step = 0  # the last one trained
        self.counts = [0] * len(STATES)
        self.reasons: Counter[str] = Counter()
        self.given: defaultdict[int, set[int]] = defaultdict(set)  # what the trainer holds, by step
        self._state = bytearray(1)
        self._about = array("Q", [0])  # a step, or an index into the words
        self._words = [""]
        self._index = {"": 0}
        self._free: list[int] = []  # a heap that holds every waiting id, and some that wait no more

    def copy(self) -> Book:
        """The same state, to go its own way."""
        other = Book()
        other.cursor, other.step, other.counts = self.cursor, self.step, self.counts[:]
        other.reasons = self.reasons.copy()
        other.given.update({step: set(ids) for step, ids in self.given.items()})
        other._state, other._about = self._state[:], self._about[:]
        other._words, other._index, other._free = self._words[:], self._index.copy(), self._free[:]
        return other

    # -- asking ------------------------------------------------------------------------------------------------------

    def next(self) -> int:
        """The smallest id that waits, else the first that nobody took yet."""
        while self._free and self._state[self._free[0]] != WAITING:
            heapq.heappop(self._free)
        return self._free[0] if self._free else self.cursor + 1

    def where(self, id: int) -> tuple[str, str | int | None]:
        """The state of an id, and the worker, the step or the reason that goes with it."""
        state = self._state[id] if 0 < id <= self.cursor else NEW
        about = self._about[id] if state else 0
        if state in (WORKER, DROPPED):
            return STATES[state], self._words[about]
        return STATES[state], about if state in (TRAINER, TRAINED) else None

    def ids(self, state: int) -> list[int]:
        """Every id in one state, ascending."""
        return unpack(self._packed(state))

    def _packed(self, state: int) -> Ids:
        runs = (match.span() for match in re.finditer(b"%c+" % state, self._state))
        return [first if end == first + 1 else [first, end - 1] for first, end in runs]

    def by(self, state: int) -> dict[str, list[int]]:
        """The ids in one state by the worker, the step or the reason that goes with it."""
        found: dict[str, list[int]] = {}
        for id in self.ids(state):
            found.setdefault(str(self.where(id)[1]), []).append(id)
        return found

    def check(self, record: Line, ids: list[int]) -> None:
        """Raises LedgerError where a move of ascending ``ids`` is not legal. Nothing has changed then."""
        sources, step = MOVES[record["do"]][0], record["step"] if record["do"] == "trained" else None
        state, cursor, last = self._state, self.cursor, 0
        for id in ids:
            if id == last:
                raise self._illegal(record, id, "names it twice")
            last = id
            if id <= cursor and id > 0 and state[id] in sources and (step is None or self._about[id] == step):
                continue
            if id == cursor + 1 and record["do"] == "lease":
                cursor = id
                continue
            at = " or ".join(STATES[source] for source in sources)
            raise self._illegal(record, id, f"needs it in state {at}" + (f" for step {step}" if step else ""))

    def _illegal(self, record: Line, id: int, why: str) -> LedgerError:
        state, about = self.where(id)
        return LedgerError(
            f"prompt {id} is in state {state}{f' ({about})' if about is not None else ''}, but record {record['n']}, "
            f"{record['do']!r}, {why}" + ("" if state != STATES[NEW] else f"; the last prompt taken is {self.cursor}")
        )

    # -- moving ------------------------------------------------------------------------------------------------------

    def apply(self, record: Line, ids: list[int]) -> None:
        """Make a move that ``check`` let pass."""
        _, target, field = MOVES[record["do"]]
        about = 0 if field is None else record[field]
        if isinstance(about, str):
            about = self._word(about)
        if ids[-1] > self.cursor:
            self._grow(ids[-1], WAITING)
        state, counts = self._state, self.counts
        for id in ids:
            old = state[id]
            if old == TRAINER:
                self._ungive(id)
            counts[old] -= 1
            state[id] = target
            self._about[id] = about
            if target == WAITING:
                heapq.heappush(self._free, id)
        counts[target] += len(ids)
        if target == TRAINER:
            self.given[about].update(ids)
        elif target == DROPPED:
            self.reasons[self._words[about]] += len(ids)
        elif target == TRAINED:
            self.step = max(self.step, about)

    def rewind(self, kept: Iterable[int]) -> list[int]:
        """Let go of what was under way: it is in the queue where it is in ``kept``, else it waits.

        Returns those of ``kept`` that are in the queue now: not the ones that this state has trained or dropped.
        """
        kept, done = set(kept), (TRAINED, DROPPED)
        if wrong := [id for id in kept if id < 1]:
            raise LedgerError(f"prompt {min(wrong)} is in no state, but a rewind wants to keep it; the first one is 1")
        queued = sorted(id for id in kept if id > self.cursor or self._state[id] not in done)
        self._grow(max([self.cursor, *queued[-1:]]), WAITING)
        under = [id for state in (WORKER, QUEUE, TRAINER) for id in self.ids(state)]
        for ids, state in ((under, WAITING), (queued, QUEUE)):
            for id in ids:
                self.counts[self._state[id]] -= 1
                self._state[id], self._about[id] = state, 0
            self.counts[state] += len(ids)
        self.given.clear()
        self._free = self.ids(WAITING)
        return queued

    def _grow(self, to: int, state: int) -> None:
        """Take every id up to ``to``."""
        more = to - self.cursor
        self._state += bytes([state]) * more
        self._about.extend([0] * more)
        self.counts[state] += more
        self.cursor = to

    def _ungive(self, id: int) -> None:
        held = self.given[self._about[id]]
        held.discard(id)
        if not held:
            del self.given[self._about[id]]

    def _word(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self._words)
            self._words.append(text)
        return self._index[text]

    # -- as a note ---------------------------------------------------------------------------------------------------

    def note(self) -> dict[str, Any]:
        """All of it but the steps at which prompts were trained, for a line of the log."""
        named = {STATES[s]: {k: pack(v) for k, v in self.by(s).items()} for s in (WORKER, TRAINER, DROPPED)}
        plain = {STATES[s]: self._packed(s) for s in (WAITING, QUEUE, TRAINED)}
        return {"cursor": self.cursor, "step": self.step, **plain, **named}

    @classmethod
    def of(cls, note: dict[str, Any]) -> Book:
        """What a note says. Prompts that were trained are trained at step 0: at which one, it does not say."""
        book = cls()
        book._grow(note["cursor"], NEW)
        for state in (WAITING, QUEUE, TRAINED):
            book._put(unpack(note[STATES[state]]), state, 0)
        for state in (WORKER, TRAINER, DROPPED):
            for name, packed in note[STATES[state]].items():
                ids = unpack(packed)
                book._put(ids, state, int(name) if state == TRAINER else book._word(name))
                if state == TRAINER:
                    book.given[int(name)] = set(ids)
                elif state == DROPPED:
                    book.reasons[name] += len(ids)
        book.step, book._free = note["step"], book.ids(WAITING)
        return book

    def _put(self, ids: list[int], state: int, about: int) -> None:
        for id in ids:
            self._state[id], self._about[id] = state, about
        self.counts[state] += len(ids)
        self.counts[NEW] -= len(ids)
