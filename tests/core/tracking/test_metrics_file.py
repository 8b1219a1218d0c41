"""metrics.jsonl holds every step once, whole, whatever happened to the process that wrote it."""

import errno
import json
import math
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges import room
from miles_core.edges.room import Room
from miles_core.edges.tracking.metrics import NAME, MetricsFile, read


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / NAME).read_text().splitlines()]


def reopen(run_dir, step):
    said = []
    file = MetricsFile(run_dir, step, Room(said.append))
    return file, said


def write(run_dir, steps):
    file, _ = reopen(run_dir, 0)
    for step in steps:
        file.append(step, {"reward/mean": step / 10, "time_s": float(step)})
    file.close()


def test_a_line_a_step_is_readable_as_soon_as_it_is_appended(tmp_path):
    file, said = reopen(tmp_path, 0)
    file.append(1, {"reward/mean": 0.5, "time_s": 1.25})
    assert (tmp_path / NAME).read_text().startswith('{"step": 1, "time_s": 1.25, ')
    file.append(2, {"loss": 0.1})
    assert lines(tmp_path) == [{"step": 1, "time_s": 1.25, "reward/mean": 0.5}, {"step": 2, "loss": 0.1}]
    assert file.history.ends("reward/mean") == (0.5, 0.5)
    assert not said


def test_numbers_that_are_not_finite_become_null_and_gaps(tmp_path):
    file, _ = reopen(tmp_path, 0)
    file.append(1, {"loss": math.nan, "kl": math.inf, "grad_norm": -math.inf, "lr": np.float32(0.5)})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "kl": None, "grad_norm": None, "lr": 0.5}]
    assert file.history.get("loss") is None
    assert file.history.series["loss"].gaps == 1
    assert reopen(tmp_path, 1)[0].history.series["loss"].gaps == 1


def test_floats_survive_exactly(tmp_path):
    file, _ = reopen(tmp_path, 0)
    file.append(1, {"loss": 0.1 + 0.2})
    assert lines(tmp_path)[0]["loss"] == 0.1 + 0.2


def test_resuming_cuts_the_steps_that_run_again(tmp_path):
    write(tmp_path, range(6))
    before = (tmp_path / NAME).read_bytes().splitlines()
    file, said = reopen(tmp_path, 3)
    assert (tmp_path / NAME).read_bytes().splitlines() == before[:4]
    assert "dropped 2 lines of steps after 3" in said[0]
    assert list(file.history.series["reward/mean"].steps) == [0, 1, 2, 3]
    file.append(4, {"reward/mean": 9.0})
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_starting_over_drops_the_evaluation_before_the_first_step_too(tmp_path):
    write(tmp_path, range(3))
    reopen(tmp_path, 0)
    assert lines(tmp_path) == []


def test_half_a_line_is_dropped_and_said(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-9])
    file, said = reopen(tmp_path, 3)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert f"{path}: dropped line 3" in said[0]
    assert "no line for the steps 3 to 3" in said[1]
    file.append(4, {})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 4]


def test_a_whole_line_that_lost_only_its_end_is_kept(tmp_path):
    write(tmp_path, range(1, 3))
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-1])
    file, said = reopen(tmp_path, 2)
    file.append(3, {})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3] and not said


@settings(deadline=None, derandomize=True)
@given(cut=st.integers(0, 400), resume=st.integers(0, 9), count=st.integers(0, 8))
def test_any_crash_leaves_whole_lines_once_each(tmp_path_factory, cut, resume, count):
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, range(count))
    path = run_dir / NAME
    before = path.read_bytes()[:cut]
    path.write_bytes(before)
    whole = [line for line in before.splitlines() if line.endswith(b"}")]
    file, _ = reopen(run_dir, resume)
    file.append(resume + 1, {"loss": 0.0})
    kept = path.read_bytes().splitlines()
    assert kept[:-1] == (whole[: resume + 1] if resume else [])
    assert read(path).last == resume + 1
    assert os.listdir(run_dir) == [NAME]


def test_on_a_full_disk_a_line_waits_and_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PAUSE", 0.0)
    file, said = reopen(tmp_path, 0)
    file.append(1, {"loss": 0.5})
    pwrite, calls = os.pwrite, []

    def scarce(handle, data, at):
        calls.append(at)
        if len(calls) % 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data[:7], at)

    monkeypatch.setattr(os, "pwrite", scarce)
    file.append(2, {"loss": 0.25})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2] and len(calls) > 10
    assert said[0] == f"{tmp_path / NAME}: No space left on device; the run waits until there is room"
    assert said[1].endswith("the run goes on")


def test_a_run_that_failed_does_not_wait_and_the_error_names_the_file(tmp_path):
    file, said = reopen(tmp_path, 0)
    file._file._room.patient = False
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), file._file._fd)
    with pytest.raises(OSError, match="No space left on device; make room.*metrics.jsonl"):
        file.append(1, {"loss": 0.0})
    assert not said


@contextmanager
def files_no_longer_than(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_line_that_does_not_fit_leaves_no_half_of_itself(tmp_path):
    file, _ = reopen(tmp_path, 0)
    file.append(1, {"loss": 0.5})
    before = (tmp_path / NAME).read_bytes()
    with files_no_longer_than(len(before) + 7), pytest.raises(OSError, match="File too large.*metrics.jsonl"):
        file.append(2, {"loss": 0.25})
    assert (tmp_path / NAME).read_bytes() == before
    file.append(2, {"loss": 0.25})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


@contextmanager
def read_only(folder):
    """The folder cannot be written by this process, not even by root."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        for parent in (folder.parent, folder.parent.parent):  # pytest's own folders are for their owner alone
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder_is_an_error_that_names_the_file_and_the_way_out(tmp_path):
    with read_only(tmp_path), pytest.raises(PermissionError) as caught:
        reopen(tmp_path, 0)
    assert caught.value.filename == str(tmp_path / NAME)
    assert "Permission denied; make the run folder writable" in str(caught.value)
