"""A log that was cut short goes on; one that is damaged is refused; what can be saved is saved."""

import pytest
from ledger_cases import lines, live_through, open_ledger, view
from miles_core.edges.store.ledger import ledger as module
from miles_core.edges.store.ledger.audit import audit
from miles_core.edges.store.ledger.lines import line, parse
from miles_core.edges.store.ledger.replay import state_at
from miles_core.edges.store.ledger.salvage import salvage
from miles_core.types import Refused


@pytest.fixture
def run(tmp_path):
    """A run with three rounds behind it."""
    ledger = open_ledger(tmp_path)
    live_through(ledger)
    ledger.close()
    return tmp_path


def log(run):
    return run / "ledger" / "log"


def test_a_torn_last_record_is_cut_at_every_byte(tmp_path):
    ledger = open_ledger(tmp_path)
    live_through(ledger, 1)
    ledger.lease([9], "rollout-0")
    before, size = view(ledger), ledger.path.stat().st_size
    ledger.lease(range(10, 20), "rollout-1")
    ledger.close()
    data = ledger.path.read_bytes()
    for end in range(size + 1, len(data)):
        ledger.path.write_bytes(data[:end])
        said = []
        again = open_ledger(tmp_path, said)
        assert view(again) == before
        assert said == [f"{log(tmp_path)}: the last {end - size} bytes, half a record {before[0] + 1}, are cut"]
        assert again.path.stat().st_size == size
        again.lease(range(10, 20), "rollout-1")
        again.close()
        assert not audit(again.path).violations


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\xff" * 40, b"01234567 {", b'01234567 {"n":3}\n', b"\n"])
def test_what_a_power_cut_leaves_is_cut(run, tail):
    data = log(run).read_bytes()
    log(run).write_bytes(data + tail)
    said = []
    open_ledger(run, said).close()
    assert len(said) == 1 and log(run).read_bytes() == data


def test_a_header_that_was_cut_is_written_again(run):
    data = log(run).read_bytes()
    for end in range(data.index(b"\n") + 1):
        log(run).write_bytes(data[:end])
        ledger = open_ledger(run)
        assert ledger.position == 0
        ledger.close()
        assert open_ledger(run).position == 0


def test_damage_before_the_last_record_is_refused_with_its_place(run):
    data, starts = log(run).read_bytes(), [0]
    for text in data.splitlines(keepends=True)[:-1]:
        starts.append(starts[-1] + len(text))
    for byte in range(starts[-1]):
        broken = bytearray(data)
        broken[byte] ^= 1 + byte % 255
        log(run).write_bytes(broken)
        number = sum(start <= byte for start in starts) - 1
        where = f"record {number}" if number else "the header"
        with pytest.raises(Refused) as refused:
            open_ledger(run)
        assert f"{log(run)} is damaged at byte {starts[number]}, where {where} begins" in str(refused.value)
        assert f"miles audit {run} --salvage" in str(refused.value)
        assert log(run).read_bytes() == broken  # nothing was touched


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3), (0, 1, 1, 2), (1, 2, 3)])
def test_whole_lines_in_a_wrong_order_are_damage(run, order):
    texts = log(run).read_bytes().splitlines(keepends=True)
    log(run).write_bytes(b"".join(texts[i] for i in order) + b"".join(texts[4:]))
    with pytest.raises(Refused, match="is damaged at byte"):
        open_ledger(run)


def test_the_ledger_of_another_run_is_refused(run):
    with pytest.raises(Refused, match="is the ledger of run one, and this is run two; give this run a run_dir"):
        open_ledger(run, name="two")


def test_another_format_is_refused_whatever_its_records_say(run):
    text = line({"format": 2, "run": "one"}) + line({"n": 1, "what": "ever"})
    log(run).write_bytes(text)
    for act in (lambda: open_ledger(run), lambda: audit(log(run)), lambda: salvage(log(run))):
        with pytest.raises(Refused, match="is written in format 2, and this Miles reads 1"):
            act()
    assert log(run).read_bytes() == text


def test_a_record_that_cannot_be_is_a_violation(run):
    texts = log(run).read_bytes().splitlines(keepends=True)
    record = parse(texts[-1])
    forged = [
        {"n": record["n"] + 1, "do": "queue", "ids": [1], "at": 0},
        {"n": record["n"] + 2, "do": "lease", "ids": [99], "to": "a", "at": 0},
        {"n": record["n"] + 3, "do": "give", "ids": [1], "step": 3, "at": 0},
        {"n": record["n"] + 4, "do": "trained", "ids": [1], "step": 3, "at": 0},
        {"n": record["n"] + 5, "do": "rewind", "position": 500, "step": 1, "kept": [], "at": 0},
        {"after": record["n"] + 5, "state": parse_state()},
    ]
    log(run).write_bytes(b"".join(texts) + b"".join(map(line, forged)))
    said = "\n".join(audit(log(run)).violations)
    for text in ("queue: prompt 1 is in state dropped", "prompt 99 is in state not taken", "was skipped"):
        assert text in said
    for text in ("step 3 is trained after step 3", "nothing is known of record 500", "the note after record"):
        assert text in said


def test_a_prompt_that_is_trained_twice_is_found(tmp_path):
    """Through moves that are legal one by one, in a log whose ledger would have refused them."""
    ledger = open_ledger(tmp_path)
    ledger.lease([1, 2], "a")
    ledger.queue([1, 2])
    ledger.give([1], 1)
    ledger.trained(1)
    n = ledger.position
    moves = [{"do": "back", "why": "x"}, {"do": "lease", "to": "a"}, {"do": "queue"}]
    moves += [{"do": "give", "step": 2}, {"do": "trained", "step": 2}]
    with log(tmp_path).open("ab") as file:
        file.write(b"".join(line({"n": n + i, "ids": [1], **move}) for i, move in enumerate(moves, 1)))
    said = audit(log(tmp_path)).violations
    assert "record 5, back: prompt 1 is in state trained, not worker queue trainer" in said
    assert "record 9: prompt 1 is trained a second time" in said


def parse_state():
    empty = {name: [] for name in ("waiting", "queue", "trained")} | {n: {} for n in ("worker", "trainer", "dropped")}
    return {"cursor": 0, "step": 0, **empty}


# -- salvage ---------------------------------------------------------------------------------------------------------


def damage(run, number, more=b""):
    """Break the line of a record; returns the bytes from before."""
    data = log(run).read_bytes()
    texts = data.splitlines(keepends=True)
    at = next(i for i, text in enumerate(texts) if (parse(text) or {}).get("n") == number)
    texts[at] = b"?" + texts[at][1:] + more
    log(run).write_bytes(b"".join(texts))
    return data


def test_a_whole_log_is_left_alone(run):
    data = log(run).read_bytes()
    assert "nothing to salvage" in salvage(log(run))[0] and log(run).read_bytes() == data


def test_without_a_note_all_before_the_damage_is_saved(run):
    whole = open_ledger(run)
    position = whole.position
    whole.close()
    broken = damage(run, 16) and log(run).read_bytes()
    said = salvage(log(run))
    assert "behind record 15; the broken log is now" in said[0] and (run / "ledger" / "log.broken-1").exists()
    assert (run / "ledger" / "log.broken-1").read_bytes() == broken
    assert f"records 16 to {position + 1} are lost" in said[1]
    ledger = open_ledger(run)
    assert ledger.position == position + 1  # no checkpoint written at a record that is lost is taken for another
    for lost in range(16, position + 1):
        with pytest.raises(Refused, match="some before were lost; go on from another checkpoint"):
            ledger.rewind(lost, 3, [])
    ledger.rewind(13, 1, [4, 7])
    assert ledger.where(4) == ("trained", 1) and ledger.where(7) == ("queue", None)
    ledger.close()
    assert not audit(log(run)).violations


@pytest.mark.parametrize("number", range(1, 39))
def test_with_notes_all_after_the_next_one_is_saved_too(tmp_path, monkeypatch, number):
    monkeypatch.setattr(module, "NOTE", 1)
    states = {0: None}
    ledger = open_ledger(tmp_path)
    for step in range(1, 6):
        live = list(range(ledger.cursor + 1, ledger.cursor + 5))
        ledger.lease(live, "a")
        states[ledger.position] = view(ledger)
        for id in live:
            ledger.queue([id])
            states[ledger.position] = view(ledger)
        ledger.give(live[:3], step)
        states[ledger.position] = view(ledger)
        ledger.trained(step)
        states[ledger.position] = view(ledger)
        if step == 3:
            ledger.rewind(ledger.position - 2, 2, live)
            states[ledger.position] = view(ledger)
            ledger.give(live[:3], step)
            ledger.trained(step)
        ledger.sync()
        states[ledger.position] = view(ledger)
    last = ledger.position
    ledger.close()
    assert number <= last
    damage(tmp_path, number)
    salvage(log(tmp_path))
    ledger = open_ledger(tmp_path)
    assert not (found := audit(log(tmp_path))).violations
    lost = {n for first, end in found.lost for n in range(first, end)}
    assert number in lost or number in {end for _, end in found.lost}
    for position in states.keys() - lost - {0}:
        again = state_at(ledger.path, position)
        assert again.cursor == states[position][1] and again.counts[1:] == list(states[position][3].values())
    ledger.close()


def test_a_broken_header_costs_only_the_name_of_the_run(run):
    data = log(run).read_bytes()
    log(run).write_bytes(b"?" + data[1:])
    assert any("the next run that opens the ledger owns it" in text for text in salvage(log(run)))
    ledger = open_ledger(run, name="whoever")
    assert ledger.position == len(lines(ledger)) - 1
    ledger.close()


def test_garbage_at_the_end_takes_its_records_along(run):
    data = log(run).read_bytes()
    texts = data.splitlines(keepends=True)
    log(run).write_bytes(b"".join(texts[:-3]) + b"garbage\n" * 3)
    n = len(texts) - 4
    assert f"records {n + 1} to {n + 4} are lost" in salvage(log(run))[1]
    assert open_ledger(run).position == n + 4
