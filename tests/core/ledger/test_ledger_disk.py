"""A full disk makes a run wait, and costs it nothing; any other trouble is raised with its place."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ledger_cases import live_through, open_ledger, view
from miles_core.edges import room
from miles_core.edges.store.ledger.audit import audit
from mounted import mounted


@pytest.fixture
def small(tmp_path):
    """A file system of 64 KiB."""
    with mounted(tmp_path / "small", "64k") as folder:
        yield folder


def test_a_disk_that_is_really_full(small, monkeypatch):
    monkeypatch.setattr(room, "PAUSE", 0.02)
    said = []
    ledger = open_ledger(small, said)
    filler = small / "filler"
    fill(filler)
    freed = []

    def free():
        while not said:
            time.sleep(0.01)
        time.sleep(0.2)
        freed.append(ledger.position)
        filler.unlink()

    other = threading.Thread(target=free)
    other.start()
    for n in range(1, 501):
        ledger.lease([n], "rollout-0")
    other.join()
    ledger.sync()
    assert ledger.position == 500 and 0 < freed[0] < 500
    assert [text.split("; ")[-1] for text in said] == ["the run waits until there is room", "the run goes on"]
    assert "No space left on device" in said[0] and str(ledger.path) in said[0]
    before = view(ledger)
    ledger.close()
    again = open_ledger(small)
    assert view(again) == before and not audit(ledger.path).violations
    again.close()


def fill(path):
    with path.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_stops_half_way_goes_on_where_it_stopped(tmp_path, monkeypatch, number):
    monkeypatch.setattr(room, "PAUSE", 0.0)
    pwrite, calls = os.pwrite, []

    def scarce(handle, data, at):
        calls.append(at)
        if len(calls) % 4 in (1, 2):
            raise OSError(number, os.strerror(number))
        return pwrite(handle, data[:7], at)

    said = []
    ledger = open_ledger(tmp_path, said)
    monkeypatch.setattr(os, "pwrite", scarce)
    positions = live_through(ledger, 1)
    monkeypatch.undo()
    before = view(ledger)
    ledger.close()
    assert positions[-1] == before[0] and view(open_ledger(tmp_path)) == before
    assert len(said) % 2 == 0 and len(set(said)) == 2  # once when it is full, once when there is room


def test_a_sync_that_fails_writes_again_what_the_kernel_forgot(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PAUSE", 0.0)
    said = []
    ledger = open_ledger(tmp_path, said)
    ledger.lease([1], "a")
    ledger.sync()
    synced = ledger.path.stat().st_size
    ledger.queue([1])
    whole, fsync, failed = ledger.path.read_bytes(), os.fsync, []

    def forgetful(handle):
        if len(failed) < 2:
            failed.append(handle)
            with ledger.path.open("r+b") as file:  # what was dirty is gone, and nobody will say so again
                file.seek(synced)
                file.write(b"\0" * (len(whole) - synced))
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", forgetful)
    ledger.sync()
    assert ledger.path.read_bytes() == whole and len(failed) == 2 and len(said) == 2


def test_other_trouble_is_raised_with_its_place_and_leaves_no_half_record(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    ledger.lease([1], "a")
    before, data, pwrite = view(ledger), ledger.path.read_bytes(), os.pwrite

    def short(handle, text, at):
        if at == len(data):
            return pwrite(handle, text[:9], at)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="Input/output error") as raised:
        ledger.queue([1])
    assert raised.value.filename == str(ledger.path) and raised.value.errno == errno.EIO
    monkeypatch.undo()
    assert view(ledger) == before and ledger.path.read_bytes() == data
    ledger.queue([1])
    assert ledger.counts()["queue"] == 1


def test_an_interrupt_while_it_waits_leaves_no_half_record(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    data, pwrite = ledger.path.read_bytes(), os.pwrite

    def full(handle, text, at):
        if at == len(data):
            return pwrite(handle, text[:9], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ledger.lease([1], "a")
    monkeypatch.undo()
    assert ledger.path.read_bytes() == data and ledger.cursor == 0
    ledger.lease([1], "a")
    assert ledger.position == 1


WAITS = """
import asyncio, errno, os, signal, sys
from pathlib import Path
from miles_core.edges import room
from miles_core.edges.store.ledger import Ledger

room.PAUSE = 0.02

async def run():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    ledger = Ledger(Path(sys.argv[1]), "one", lambda text: print(text, flush=True))
    ledger.lease([1], "a")
    def full(handle, data, at):
        raise OSError(errno.ENOSPC, "No space left on device")
    os.pwrite = full
    try:
        ledger.queue([1])
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        try:
            ledger.lease([2], "a")
        except asyncio.CancelledError:
            print("and again", flush=True)
        raise

asyncio.run(run())
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_waits_for_room(tmp_path, sent):
    """As the driver holds it: an event loop whose handler would only hear of it at the loop's next turn."""
    command = [sys.executable, "-c", WAITS, str(tmp_path / "ledger")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "the run waits until there is room" in process.stdout.readline()
            time.sleep(0.1)
            process.send_signal(sent)
            said, why = process.communicate(timeout=20)
        finally:
            process.kill()
    assert said.splitlines()[0] == "cancelled" and said.splitlines()[-1] == "and again" and process.returncode, why
    ledger = open_ledger(tmp_path, said := [])
    assert ledger.where(1) == ("worker", "a") and ledger.position == 1 and not said
    ledger.close()


def test_nothing_but_sync_waits_for_the_disk(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    ledger = open_ledger(tmp_path)
    live_through(ledger)
    assert not calls
    ledger.sync()
    assert len(calls) == 3  # the log, and the two folders its name is in
    ledger.sync()
    assert len(calls) == 4
