"""Whatever happens in whatever order, and wherever it is cut short: the ledger is what a simple model says."""

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ledger_cases import open_ledger
from miles_core.edges.store.ledger import ledger as module
from miles_core.edges.store.ledger.audit import audit

HOLDS = {"lease": ["waiting"], "queue": ["worker"], "drop": ["worker", "queue"], "give": ["queue"]}
HOLDS["back"] = ["worker", "queue", "trainer"]


class Machine(RuleBasedStateMachine):
    """``history[k]`` is the model after k records: each prompt's state, and the last step trained."""

    note = module.NOTE

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "NOTE", self.note)
        self.patch.setattr(module, "_now", lambda: 1.5)  # records of one length, whatever the time
        self.run = Path(tempfile.mkdtemp())
        self.ledger = open_ledger(self.run)
        self.history = [({}, 0)]
        self.ends = [self.size()]  # of the file after each record
        self.step = 0

    def size(self):
        return self.ledger.path.stat().st_size

    @property
    def at(self):
        return self.history[-1][0]

    def took(self, at, step=None):
        self.history.append((at, self.history[-1][1] if step is None else step))
        self.ends.append(self.size())

    def some(self, data, do):
        ids = [id for id, (state, _) in self.at.items() if state in HOLDS[do]]
        return data.draw(st.lists(st.sampled_from(ids), unique=True, min_size=1) if ids else st.just([]))

    def move(self, ids, state, about=None):
        if ids:
            self.took({**self.at, **{id: (state, about) for id in ids}})

    @rule(data=st.data(), new=st.integers(0, 9), to=st.sampled_from("ab"))
    def lease(self, data, new, to):
        ids = self.some(data, "lease") + list(range(len(self.at) + 1, len(self.at) + new + 1))
        self.ledger.lease(ids, to)
        self.move(ids, "worker", to)

    @rule(data=st.data())
    def lease_next(self, data):
        id = self.ledger.next()
        self.ledger.lease([id], "c")
        self.move([id], "worker", "c")

    @rule(data=st.data())
    def queue(self, data):
        ids = self.some(data, "queue")
        self.ledger.queue(ids)
        self.move(ids, "queue")

    @rule(data=st.data(), why=st.sampled_from(["old", "died"]))
    def back(self, data, why):
        ids = self.some(data, "back")
        self.ledger.back(ids, why)
        self.move(ids, "waiting")

    @rule(data=st.data(), why=st.sampled_from(["long", 'sa"me']))
    def drop(self, data, why):
        ids = self.some(data, "drop")
        self.ledger.drop(ids, why)
        self.move(ids, "dropped", why)

    @rule(data=st.data(), ahead=st.integers(1, 2))
    def give(self, data, ahead):
        ids = self.some(data, "give")
        step = self.history[-1][1] + ahead
        self.ledger.give(ids, step)
        self.move(ids, "trainer", step)

    @precondition(lambda self: any(state == "trainer" for state, _ in self.at.values()))
    @rule()
    def trained(self):
        step = min(step for state, step in self.at.values() if state == "trainer")
        self.ledger.trained(step)
        ids = [id for id, place in self.at.items() if place == ("trainer", step)]
        self.took({**self.at, **{id: ("trained", step) for id in ids}}, step)

    @rule()
    def sync(self):
        self.ledger.sync()

    @rule(data=st.data())
    def rewind(self, data):
        position = data.draw(st.integers(0, len(self.history) - 1))
        kept = data.draw(st.sets(st.integers(1, len(self.at) + 2)))
        old, step = deepcopy(self.history[position])
        self.ledger.rewind(position, step, kept)
        for id in range(1, max([len(old), *(id for id in kept if id > len(old))]) + 1):
            if old.get(id, ("", None))[0] not in ("trained", "dropped"):
                old[id] = ("queue" if id in kept else "waiting", None)
        self.took(old, step)

    @rule(data=st.data())
    def crash(self, data):
        """The file ends at any byte, at the beginning, in the middle or behind the end of any record."""
        end = data.draw(st.one_of(st.integers(0, self.size()), st.sampled_from(self.ends)))
        self.ledger.close()
        with self.ledger.path.open("r+b") as file:
            file.truncate(end)
        self.ledger = open_ledger(self.run)
        whole = max(sum(byte <= end for byte in self.ends), 1)
        del self.history[whole:], self.ends[whole:]
        if not whole > 1:
            self.ends = [self.size()]

    @invariant()
    def is_what_the_model_says(self):
        ledger = self.ledger
        assert ledger.position == len(self.history) - 1 and ledger.cursor == len(self.at)
        assert {id: ledger.where(id) for id in self.at} == self.at
        states = [state for state, _ in self.at.values()]
        assert ledger.counts() == {state: states.count(state) for state in ledger.counts()}
        assert sum(ledger.counts().values()) == ledger.cursor
        reasons = [why for state, why in self.at.values() if state == "dropped"]
        assert ledger.reasons() == {why: reasons.count(why) for why in set(reasons)}
        waiting = [id for id, (state, _) in self.at.items() if state == "waiting"]
        assert ledger.next() == min(waiting, default=len(self.at) + 1)

    def teardown(self):
        self.patch.undo()
        self.ledger.close()
        found = audit(self.ledger.path)
        assert not found.violations and found.reader.number == len(self.history) - 1
        assert {id: found.places[id] for id in sorted(found.places)} == {id: self.at[id] for id in sorted(self.at)}
        shutil.rmtree(self.run)


class WithNotes(Machine):
    """The same, with a note at every sync that may write one."""

    note = 1


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWithNotes = WithNotes.TestCase
TestWithNotes.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
