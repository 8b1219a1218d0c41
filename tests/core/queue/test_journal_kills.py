"""The process of the journal dies at any moment, or its disk fills: what it said is written is there, and once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from miles_core.edges.queue import disk
from miles_core.edges.queue.journal import Journal
from mounted import mounted

SEGMENT = 1 << 14  # small, so that segments turn and go all the time
WRITER = """
import random, sys
from miles_core.edges.queue.journal import Journal

journal, draw = Journal(sys.argv[1], 1 << 14, "one"), random.Random(int(sys.argv[2]))
live, _ = journal.open()
live, id = list(live), int(sys.argv[3])
while True:
    gone = [live.pop(draw.randrange(len(live))) for _ in range(draw.randrange(4)) if len(live) > 5]
    print("forget", *gone, flush=True)
    ids = list(range(id, id + draw.randrange(1, 4)))
    id = ids[-1] + 1
    print("write", *ids, flush=True)
    done, why = journal.write(gone, ids, [b"%d," % i * (1 + i * 7919 % 900) for i in ids])
    assert (done, why) == (len(ids), "")
    live += ids
    print("wrote", *ids, flush=True)
"""


def payload(id: int) -> bytes:
    return b"%d," % id * (1 + id * 7919 % 900)


def test_killed_anywhere_it_has_what_it_said_it_wrote_and_once(tmp_path: Path) -> None:
    draw, kept, forgotten, begun, next_id = random.Random(7), set[int](), set[int](), set[int](), 1
    for life in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(life), str(next_id)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            lines = [process.stdout.readline() for _ in range(draw.randrange(3, 60))]
            os.kill(process.pid, signal.SIGKILL)
            lines += [line for line in process.stdout if line.endswith("\n")]
        for line in lines:
            what, *ids = line.split()
            if what == "forget":
                forgotten |= {int(id) for id in ids}
            else:
                (kept if what == "wrote" else begun).update(map(int, ids))
        journal = Journal(str(tmp_path), SEGMENT, "one")
        found, _ = journal.open()
        assert kept - forgotten <= found.keys() <= begun
        assert [bytes(data) for data in journal.read(list(found))] == [payload(id) for id in found]
        journal.write([id for id in found if id in forgotten], [], [])
        journal.close()
        kept, next_id = found.keys() - forgotten, max(begun, default=0) + 10
    assert len(begun) > 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with mounted(tmp_path / "small", "256k") as folder:
        yield folder


def test_a_journal_whose_disk_is_really_full_says_how_far_it_came_and_goes_on(small: Path) -> None:
    journal, ids = Journal(str(small), SEGMENT, "one"), list(range(1, 200))
    journal.open()
    done, why = journal.write([], ids, [bytes(4000)] * len(ids))
    assert 20 < done < len(ids) and "No space left on device" in why
    assert journal.write([], ids[done:], [bytes(4000)] * (len(ids) - done))[0] == 0  # nothing half there either
    again, _ = journal.write(ids[:10], ids[done:], [bytes(4000)] * (len(ids) - done))
    assert 0 < again <= 10
    journal.close()
    found, damage = Journal(str(small), SEGMENT, "one").open()
    assert list(found) == ids[10 : done + again] and not damage


def test_a_clock_that_jumps_changes_neither_order_nor_the_wait_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1e9, -5.0, 2e9, 0.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    journal = Journal(str(tmp_path), SEGMENT, "one")
    journal.open()
    for id in (5, 3, 9, 1):
        journal.write([], [id], [b"x" * id])
    monkeypatch.setattr(disk, "LOCK_S", 5.0)
    threading.Timer(0.1, journal.close).start()
    assert list(Journal(str(tmp_path), SEGMENT, "one").open()[0]) == [5, 3, 9, 1]
