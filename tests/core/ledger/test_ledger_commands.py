"""What a person sees of the ledger: while it grows, after a crash, and when it is broken."""

import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from ledger_cases import live_through, open_ledger
from miles_core.cli import main
from miles_core.edges.store.ledger.lines import line

WRITER = """
import sys, time
from pathlib import Path
from miles_core.edges.store.ledger import Ledger

ledger, step = Ledger(Path(sys.argv[1]), "one", print), 0
while True:
    ids = []
    while len(ids) < 16:
        ids.append(ledger.next())
        ledger.lease(ids[-1:], f"rollout-{len(ids) % 4}")
    ledger.back(ids[12:], "its worker died")
    ledger.queue(ids[:12])
    ledger.drop(ids[:4], "all the same")
    step += 1
    time.sleep(0.002)
    ledger.give(ids[4:12], step)
    ledger.trained(step)
    if step % 10 == 0:
        ledger.sync()
    if step == 50:
        print(ledger.position, flush=True)
"""


def miles(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def writing(tmp_path):
    """A process that writes the ledger of ``tmp_path`` as fast as it can, fifty steps or more into its run."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "ledger")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) > 1000
        yield process
        process.kill()


def test_status_of_a_run_that_is_alive(writing, tmp_path):
    records = []
    for _ in range(10):
        done = miles("status", tmp_path)
        assert done.exit_code == 0, done.output
        records.append(int(done.output.split(" records")[0].split()[-1]))
        audited = miles("audit", tmp_path)
        assert audited.exit_code == 0, audited.output
    assert records == sorted(records)
    assert writing.poll() is None and records[-1] > records[0], "it was not written meanwhile"


def test_a_run_that_is_killed_loses_nothing(writing, tmp_path):
    os.kill(writing.pid, signal.SIGKILL)
    writing.wait()
    assert miles("status", tmp_path).exit_code == 0
    ledger = open_ledger(tmp_path)
    audited = miles("audit", tmp_path)
    assert audited.exit_code == 0, audited.output
    assert "Every prompt was in exactly one state after every record" in audited.output
    assert sum(ledger.counts().values()) == ledger.cursor > 500
    ledger.rewind(1000, 10**6, range(1, 5000, 3))
    ledger.close()
    assert miles("audit", tmp_path).exit_code == 0


def test_status_says_who_holds_what(tmp_path):
    ledger = open_ledger(tmp_path)
    live_through(ledger)
    ledger.lease([ledger.next()], "rollout-0")
    ledger.lease(range(ledger.cursor + 1, ledger.cursor + 4), "rollout-1")
    ledger.give([6], 4)
    with ledger.path.open("ab") as file:
        file.write(b"01234567 {")
    done = miles("status", tmp_path)
    assert done.exit_code == 0 and ledger.path.read_bytes().endswith(b"{")
    for text in (
        "the last record is half there",
        "step 3 trained",
        "worker           4  rollout-1: 3, rollout-0: 1",
        "trainer          1  step 4: 1",
        "trained          9\n",
        "dropped          6  all the same: 6",
    ):
        assert text in done.output, done.output


def test_status_and_audit_before_anything_happened(tmp_path):
    open_ledger(tmp_path)
    assert "no prompt was taken yet" in miles("status", tmp_path).output
    assert miles("audit", tmp_path).exit_code == 0


@pytest.mark.parametrize("words", [["status"], ["audit"], ["audit", "--salvage"]])
def test_a_folder_without_a_ledger_is_bad_input(tmp_path, words):
    done = miles(*words, tmp_path)
    assert done.exit_code == 2 and "no ledger is at" in done.output and not list(tmp_path.iterdir())


def test_the_audit_sums_up(tmp_path):
    ledger = open_ledger(tmp_path)
    positions = live_through(ledger)
    ledger.rewind(positions[1], 2, [5])
    done = miles("audit", tmp_path)
    assert done.exit_code == 0
    n = ledger.position
    for text in (
        f"{n} records, {n - 1 - positions[1]} of them void",
        "dropped      4: all the same 4",
        "returned     6: its worker died 6",
        f"record {n} to {positions[1]}, after step 2: 0 prompts kept",
    ):
        assert text in done.output, done.output


def test_violations_end_with_1_and_damage_with_2_until_it_is_salvaged(tmp_path):
    ledger = open_ledger(tmp_path)
    live_through(ledger)
    ledger.close()
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data + line({"n": ledger.position + 1, "do": "queue", "ids": [1], "at": 0}))
    done = miles("audit", tmp_path)
    assert done.exit_code == 1 and "violation    record" in done.output and "Every prompt" not in done.output
    ledger.path.write_bytes(data[:300] + b"?" + data[301:])
    for word in ("status", "audit"):
        done = miles(word, tmp_path)
        assert done.exit_code == 2 and f"miles audit {tmp_path} --salvage" in done.output
    done = miles("audit", tmp_path, "--salvage")
    assert done.exit_code == 0 and "the broken log is now" in done.output and "nothing is proven" in done.output
    assert "Of the records that are left: every prompt" in done.output
    assert miles("status", tmp_path).exit_code == 0


def test_a_run_that_writes_is_not_salvaged(writing, tmp_path):
    done = miles("audit", tmp_path, "--salvage")
    assert done.exit_code == 2 and "is the run still alive" in done.output


def test_a_long_run_opens_again_in_time_that_grows_with_it_only(tmp_path):
    """Four times the records take about four times as long, and not sixteen times."""
    took = []
    for n in (4000, 16000):
        ledger = open_ledger(tmp_path / str(n))
        for id in range(1, n + 1):
            ledger.lease([id], "a")
        ledger.sync()
        ledger.close()
        began = time.process_time()
        open_ledger(tmp_path / str(n)).close()
        took.append(time.process_time() - began)
    assert took[1] < 12 * took[0]
