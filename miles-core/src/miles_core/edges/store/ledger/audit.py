"""The whole history once more, by other means than the ledger's own: does every record say what can be?

The rules are written here a second time on purpose. A mistake in ``book.py`` then shows as a violation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .lines import Line, Reader, unpack
from .replay import refuse

SOURCES = {
    "lease": ("waiting", "worker"),
    "queue": ("worker", "queue"),
    "back": ("worker queue trainer", "waiting"),
    "drop": ("worker queue", "dropped"),
    "give": ("queue", "trainer"),
    "trained": ("trainer", "trained"),
}
AT_MOST = 100  # violations; one mistake tends to bring others

Places = dict[int, tuple[str, str | int | None]]


@dataclass(frozen=True, slots=True)
class Rewind:
    """A resume: record ``number`` went back to ``position``, and ``again`` prompts that were sampled wait again."""

    number: int
    position: int
    step: int
    kept: int
    again: int


@dataclass(slots=True)
class Audit:
    """What the history amounts to, and what is wrong with it."""

    reader: Reader
    places: Places = field(default_factory=dict)  # of every prompt taken
    violations: list[str] = field(default_factory=list)
    returned: Counter[str] = field(default_factory=Counter)  # prompts, in all records, void ones too
    sampled: Counter[int] = field(default_factory=Counter)  # how often each prompt was sampled to the end
    rewinds: list[Rewind] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)  # ranges of records that a salvage could not keep
    trained: list[tuple[int, int | None, list[int]]] = field(default_factory=list)  # record, step or a loss, prompts

    def live(self) -> list[tuple[int, int]]:
        """Ranges of records that the present state rests on, newest first."""
        ranges, last = [], self.reader.number
        for rewind in reversed(self.rewinds):
            if rewind.number <= last:
                ranges.append((rewind.number, last))
                last = rewind.position
        return [*ranges, (1, last)]

    def void(self) -> int:
        """How many records were taken back by a rewind."""
        live = self.live()
        outside = sum(b - a + 1 for a, b in self.lost if not any(first <= b <= last for first, last in live))
        return self.reader.number - sum(last - first + 1 for first, last in live) - outside


def audit(path: Path) -> Audit:
    """Go through a log from its first record. Raises Refused where it cannot be read to its last whole line."""
    reader = Reader(path)
    found = Audit(reader)
    positions = {fields["position"] for fields in Reader(path) if fields.get("do") == "rewind"}
    saved: dict[int, Places] = {0: {}}
    for fields in reader:
        if "n" not in fields:
            _note(found, fields)
        elif fields["do"] == "rewind":
            _rewind(found, fields, saved)
        else:
            _move(found, fields)
        if reader.number in positions:
            saved[reader.number] = found.places.copy()
        if len(found.violations) >= AT_MOST:
            break
    refuse(reader)
    _whole(found)
    _once(found)
    return found


def _move(found: Audit, record: Line) -> None:
    do, places, wrong = record["do"], found.places, found.violations
    sources, target = SOURCES[do]
    about = record.get("why" if do == "drop" else "to", record.get("step"))
    ids = unpack(record["ids"])
    if len(ids) != len(set(ids)):
        wrong.append(f"record {record['n']}, {do}: names a prompt twice")
    for id in ids:
        if do == "lease" and id == len(places) + 1:
            places[id] = ("waiting", None)
        state, was = places.get(id, ("not taken", None))
        if state not in sources.split():
            wrong.append(f"record {record['n']}, {do}: prompt {id} is in state {state}, not {sources}")
        elif do == "trained" and was != about:
            wrong.append(f"record {record['n']}, {do}: prompt {id} was given for step {was}, not {about}")
        places[id] = (target, about)
    if do == "back":
        found.returned[record["why"]] += len(ids)
    elif do == "queue":
        found.sampled.update(ids)
    elif do == "trained":
        found.trained.append((record["n"], record["step"], ids))


def _rewind(found: Audit, record: Line, saved: dict[int, Places]) -> None:
    """Back to ``position``: drop what was under way there, then put what was kept in the queue."""
    number, position, kept = record["n"], record["position"], set(unpack(record["kept"]))
    if position not in saved or position >= number:
        found.violations.append(f"record {number}, rewind: nothing is known of record {position}")
        return
    places = saved[position].copy()
    late = [step for state, step in places.values() if state == "trained" and step and int(step) > record["step"]]
    if late:
        found.violations.append(f"record {number}, rewind: after step {record['step']}, yet step {late[0]} was trained")
    under = [id for id, (state, _) in places.items() if state in ("worker", "queue", "trainer")]
    places |= {id: ("waiting", None) for id in [*under, *range(len(places) + 1, max(kept, default=0) + 1)]}
    for id in kept:
        if places[id][0] in ("trained", "dropped"):
            found.violations.append(f"record {number}, rewind: prompt {id} is {places[id][0]}, and cannot be kept")
        places[id] = ("queue", None)
    done = [id for id, (state, _) in found.places.items() if state not in ("waiting", "worker")]
    again = sum(id not in places or places[id][0] == "waiting" for id in done)
    found.places = places
    found.rewinds.append(Rewind(number, position, record["step"], len(kept), again))


def _note(found: Audit, note: Line) -> None:
    """A note repeats the state; the one that a salvage writes is where the account begins anew."""
    state = note["state"]
    places: Places = {}
    for name in ("waiting", "queue", "trained"):
        for id in unpack(state[name]):
            places[id] = (name, None)
    for name in ("worker", "trainer", "dropped"):
        for about, ids in state[name].items():
            places.update({id: (name, int(about) if name == "trainer" else about) for id in unpack(ids)})
    if "lost" in note:
        found.lost.append((note["lost"][0], note["lost"][1]))
        found.places = places
        found.trained.append((note["after"], None, unpack(state["trained"])))
        return
    have = {id: (name, None if name == "trained" else about) for id, (name, about) in found.places.items()}
    if have != places:
        differ = min(id for id in have.keys() | places.keys() if have.get(id) != places.get(id))
        found.violations.append(f"the note after record {note['after']} puts prompt {differ} where no record did")


def _whole(found: Audit) -> None:
    """No prompt is skipped: those taken are 1, 2, 3 and so on."""
    if gone := set(range(1, max(found.places, default=0) + 1)) - found.places.keys():
        found.violations.append(f"prompt {min(gone)} was skipped: it is in no state, and prompt {max(found.places)} is")


def _once(found: Audit) -> None:
    """Among the records that count, nothing is trained twice, steps go up, and the state agrees."""
    live, seen, last = found.live(), set[int](), 0
    for number, step, ids in found.trained:
        if not any(first <= number <= end for first, end in live):
            continue
        if step is None:  # the account began anew, with these trained
            seen = set(ids)
            continue
        if twice := seen.intersection(ids):
            found.violations.append(f"record {number}: prompt {min(twice)} is trained a second time")
        if step <= last:
            found.violations.append(f"record {number}: step {step} is trained after step {last}")
        seen.update(ids)
        last = step
    if seen != {id for id, (state, _) in found.places.items() if state == "trained"}:
        found.violations.append("the prompts trained are not those that the records which count have trained")
