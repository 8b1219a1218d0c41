"""Each prompt is in one state, and moves only where it may."""

import subprocess
import sys
import time

import pytest
from ledger_cases import live_through, open_ledger, view
from miles_core.edges.lasting import LedgerError
from miles_core.edges.store.ledger.lines import pack, unpack
from miles_core.types import Refused


@pytest.fixture
def ledger(tmp_path):
    ledger = open_ledger(tmp_path)
    yield ledger
    ledger.close()


def test_a_prompt_goes_through_its_states(ledger):
    assert (ledger.next(), ledger.where(1), ledger.position) == (1, ("not taken", None), 0)
    ledger.lease([1, 2, 3], "rollout-0")
    assert (ledger.where(2), ledger.cursor, ledger.next()) == (("worker", "rollout-0"), 3, 4)
    ledger.queue([2, 1])
    assert ledger.where(1) == ("queue", None)
    ledger.give([1], 7)
    assert ledger.where(1) == ("trainer", 7)
    ledger.trained(7)
    ledger.drop([2], "too long")
    ledger.back([3], "its worker died")
    assert [ledger.where(i) for i in (1, 2, 3)] == [("trained", 7), ("dropped", "too long"), ("waiting", None)]
    assert ledger.counts() == {"waiting": 1, "worker": 0, "queue": 0, "trainer": 0, "trained": 1, "dropped": 1}
    assert ledger.reasons() == {"too long": 1} and ledger.position == 6


def test_what_waits_is_sampled_before_what_is_new_and_the_smallest_first(ledger):
    ledger.lease(range(1, 6), "a")
    ledger.back([4, 2], "x")
    assert ledger.next() == ledger.next() == 2  # asking leases nothing
    ledger.lease([2], "b")
    assert ledger.next() == 4
    ledger.lease([4], "b")
    assert ledger.next() == 6
    ledger.back([2], "x")
    assert ledger.next() == 2


def test_one_record_may_mix_what_waits_and_what_is_new(ledger):
    ledger.lease([1, 2], "a")
    ledger.back([1], "x")
    ledger.lease([1, 3, 4], "a")
    assert ledger.counts()["worker"] == 4 and ledger.cursor == 4


def test_nothing_is_no_record(ledger):
    ledger.lease([], "a")
    ledger.queue(iter(()))
    assert ledger.position == 0


ILLEGAL = [
    (
        lambda it: it.lease([10], "a"),
        "prompt 10 is in state not taken, but record 7, 'lease', needs it .* waiting",
    ),
    (lambda it: it.lease([9, 11], "a"), "prompt 11 .* the last prompt taken is 8"),
    (lambda it: it.lease([1], "a"), r"prompt 1 is in state trained \(1\)"),
    (lambda it: it.lease([0], "a"), "prompt 0 is in state not taken"),
    (lambda it: it.queue([5, 5]), "prompt 5 .* names it twice"),
    (lambda it: it.queue([5, 3]), r"prompt 3 is in state queue, but record 7, 'queue', needs it in state worker"),
    (lambda it: it.give([5], 2), r"prompt 5 is in state worker \(a\)"),
    (lambda it: it.back([1], "x"), "needs it in state worker or queue or trainer"),
    (lambda it: it.drop([2], "x"), r"prompt 2 is in state trainer \(2\)"),
    (lambda it: it.trained(1), "the trainer holds nothing for step 1"),
    (lambda it: it.rewind(it.position, 0, []), "step 1 was trained, so no checkpoint of step 0"),
    (lambda it: it.rewind(it.position, 1, [0]), "prompt 0"),
    (lambda it: it.rewind(-1, 1, []), "written at record -1"),
    (lambda it: it.rewind(7, 1, []), "written at record 7, which .* does not have: it ends at 6"),
]


@pytest.mark.parametrize("act, said", ILLEGAL)
def test_what_cannot_be_is_refused_by_name_and_changes_nothing(ledger, act, said):
    ledger.lease(range(1, 9), "a")
    ledger.queue([1, 2, 3])
    ledger.give([1], 1)
    ledger.trained(1)
    ledger.give([2], 2)
    ledger.drop([4], "x")
    before, size = view(ledger), ledger.path.stat().st_size
    with pytest.raises((LedgerError, Refused), match=said):
        act(ledger)
    assert view(ledger) == before and ledger.path.stat().st_size == size


def test_it_comes_back_as_it_was(ledger, tmp_path):
    live_through(ledger)
    ledger.rewind(10, 1, [3, 4])
    before = view(ledger)
    ledger.close()
    again = open_ledger(tmp_path)
    assert view(again) == before
    live_through(again, 1)


def test_a_resume_keeps_what_survived_and_samples_the_rest_again(ledger):
    ledger.lease(range(1, 9), "a")
    ledger.queue([1, 2, 3, 4])
    ledger.give([1], 1)
    ledger.trained(1)
    ledger.give([2], 2)
    ledger.drop([3], "x")
    position = ledger.position
    ledger.trained(2)  # all of this is void
    ledger.queue([5, 6])
    ledger.drop([6], "x")
    ledger.lease(range(9, 15), "a")
    ledger.queue([9, 12])
    ledger.rewind(position, 1, [1, 3, 4, 5, 12])
    assert [ledger.where(i)[0] for i in range(1, 14)] == [
        *("trained", "waiting", "dropped", "queue", "queue", "waiting", "waiting", "waiting"),
        *("waiting", "waiting", "waiting", "queue", "not taken"),
    ]
    assert (ledger.cursor, ledger.next(), ledger.position) == (12, 2, position + 5 + 1)


def test_a_resume_from_nothing_starts_over(ledger):
    live_through(ledger)
    ledger.rewind(0, 0, [])
    assert (ledger.cursor, ledger.next(), sum(ledger.counts().values())) == (0, 1, 0)
    ledger.rewind(0, 0, [2])
    assert (ledger.cursor, ledger.where(1), ledger.where(2)) == (2, ("waiting", None), ("queue", None))


def test_a_checkpoint_of_a_branch_that_was_left_can_still_be_gone_back_to(ledger):
    positions = live_through(ledger)
    there = [ledger.where(id) for id in range(1, ledger.cursor + 1)]
    ledger.rewind(positions[0], 1, [])
    ledger.rewind(positions[2], 3, [id for id, (state, _) in enumerate(there, 1) if state == "queue"])
    assert [ledger.where(id) for id in range(1, len(there) + 1)] == there


def test_ids_are_written_as_ranges():
    assert pack([5, 1, 2, 3, 9, 8]) == [[1, 3], 5, [8, 9]] and unpack([[1, 3], 5, [8, 9]]) == [1, 2, 3, 5, 8, 9]
    assert pack([]) == [] and pack([4]) == [4]


def test_a_record_can_be_read_by_a_person(ledger):
    ledger.lease(range(1, 65), "rollout-0")
    last = ledger.path.read_text().splitlines()[-1]
    assert '{"n":1,"do":"lease","ids":[[1,64]],"to":"rollout-0","at":' in last and len(last) < 100


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    clock = iter([1e9, -5.0, 2e9, 0.0, 3e9, 1.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    jumping = open_ledger(tmp_path / "jumping")
    monkeypatch.undo()
    steady = open_ledger(tmp_path / "steady")
    positions = live_through(steady)
    steady.rewind(positions[1], 2, [5])
    clock = iter([1e9, -5.0, 2e9, 0.0, 3e9, 1.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    live_through(jumping)
    jumping.rewind(positions[1], 2, [5])
    jumping.close()
    assert view(open_ledger(tmp_path / "jumping")) == view(steady)


def test_two_runs_do_not_write_one_ledger(tmp_path):
    code = (
        "import sys; from pathlib import Path; from miles_core.edges.store.ledger import Ledger;"
        "Ledger(Path(sys.argv[1]), 'one', print); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ledger")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(Refused, match="another process; is the run still alive"):
            open_ledger(tmp_path)
        other.stdin.close()
    open_ledger(tmp_path)
