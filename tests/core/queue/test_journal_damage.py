"""What stands on the disk is not what was written: a torn end is cut, a damaged middle refused until it is salvaged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.queue.disk import MARK, promised
from miles_core.edges.queue.journal import Journal
from miles_core.edges.queue.salvage import salvage
from miles_core.edges.queue.segment import HEADER, LABEL, header, label
from miles_core.types import Refused

SIZE = 100  # of a payload, in bytes
EACH = HEADER + SIZE
SEGMENT = LABEL + 3 * EACH  # three records in each


def payload(id: int) -> bytes:
    return bytes([id % 251]) * SIZE


def fill(folder: Path, synced: int, more: int = 0) -> None:
    """Groups 1 to ``synced``, which are promised, and as many ``more``."""
    journal = Journal(str(folder), SEGMENT, "one")
    journal.open()
    for first, last in ((1, synced), (synced + 1, synced + more)):
        ids = list(range(first, last + 1))
        assert journal.write([], ids, [payload(id) for id in ids]) == (len(ids), "")
        if first == 1:
            assert journal.sync() == ([], "")
    journal.close()


def reopen(folder: Path, run: str = "one") -> tuple[list[int], list[str]]:
    """What is found, each one whole, and what was cut; one more opening finds the same, with nothing more to cut."""
    found, said = opened(folder, run)
    assert opened(folder, run) == (found, [])
    return found, said


def opened(folder: Path, run: str) -> tuple[list[int], list[str]]:
    journal = Journal(str(folder), SEGMENT, run)
    try:
        found, said = journal.open()
        assert [bytes(data) for data in journal.read(list(found))] == [payload(id) for id in found]
    finally:
        journal.close()
    return list(found), said


def place(folder: Path, id: int) -> tuple[Path, int]:
    """The segment of a group, and the byte at which its record begins."""
    return folder / f"{(id + 2) // 3:08d}.seg", LABEL + (id - 1) % 3 * EACH


def damage(path: Path, at: int, data: bytes = b"\0" * 8) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("synced", [1, 5])
@pytest.mark.parametrize("left", [1, HEADER, EACH - 1])
def test_a_torn_last_record_is_cut_and_said(tmp_path: Path, synced: int, left: int) -> None:
    fill(tmp_path, synced, 5 - synced)
    path, at = place(tmp_path, 5)
    os.truncate(path, at + left)
    found, said = reopen(tmp_path)
    assert found == [1, 2, 3, 4]
    assert len(said) == 1 and f"{path}: " in said[0] and f"the last {left} bytes are cut;" in said[0]
    assert path.stat().st_size == at


@pytest.mark.parametrize("where", [0, HEADER])
@pytest.mark.parametrize("id", [2, 6])
def test_what_was_promised_and_is_damaged_is_refused_with_its_place_until_it_is_salvaged(
    tmp_path: Path, id: int, where: int
) -> None:
    run, queue = tmp_path / "run", tmp_path / "run" / "queue"
    fill(queue, 8, 2)
    path, at = place(queue, id)
    damage(path, at + where + 8)
    before = {file: file.read_bytes() for file in queue.iterdir()}
    with pytest.raises(Refused) as refused:
        reopen(queue)
    assert f"{path} is damaged at byte {at}:" in str(refused.value)
    assert str(refused.value).endswith(f"miles audit {run} --salvage")
    assert {file: file.read_bytes() for file in queue.iterdir()} == before, "it was changed"
    said = "\n".join(salvage(queue, "one"))
    aside = path.with_name(f"{path.name}.broken-1")
    assert aside.read_bytes() == before[path] and str(aside) in said and f"at byte {at}" in said
    assert "9 groups of the queue are kept" in said and "sampled again" in said
    assert reopen(queue) == ([n for n in range(1, 11) if n != id], [])
    assert "nothing to salvage" in salvage(queue, "one")[0]


def test_the_label_of_a_promised_segment_is_salvaged_as_its_records_are(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    path, _ = place(tmp_path, 1)
    damage(path, 3)
    with pytest.raises(Refused, match="at byte 0"):
        reopen(tmp_path)
    salvage(tmp_path, "one")
    assert reopen(tmp_path) == ([1, 2, 3, 4, 5], []) and path.read_bytes().startswith(label("one"))


def test_what_no_sync_had_promised_is_cut_from_the_first_damage_on(tmp_path: Path) -> None:
    fill(tmp_path, 4, 6)
    path, at = place(tmp_path, 6)
    damage(path, at + HEADER)
    found, said = reopen(tmp_path)
    assert found == [1, 2, 3, 4, 5]
    assert "group 6 is wrong" in said[0] and "4 whole records behind them, which were not synced yet" in said[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.data())
def test_whatever_a_power_cut_leaves_of_what_was_not_synced_is_no_reason_to_refuse(
    tmp_path_factory: pytest.TempPathFactory, synced: int, more: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    fill(folder, synced, more)
    number, end = promised(folder)
    for path in sorted(folder.glob("*.seg")):
        since = end if int(path.stem) == number else 0
        size = path.stat().st_size
        if int(path.stem) < number or since == size:
            continue
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(since, size - 1))
            damage(path, at, b"\0" * data.draw(st.integers(1, size - at)))
        os.truncate(path, data.draw(st.integers(since, size)))
    found, _ = reopen(folder)
    assert found == sorted(found) and found[:synced] == list(range(1, synced + 1))


def test_numbers_that_a_mark_speaks_of_are_not_given_again(tmp_path: Path) -> None:
    fill(tmp_path, 7)
    journal = Journal(str(tmp_path), SEGMENT, "one")
    journal.write(list(journal.open()[0]), [], [])
    journal.close()
    assert not list(tmp_path.glob("*.seg"))
    fill(tmp_path, 0, 3)
    assert [int(path.stem) for path in tmp_path.glob("*.seg")] == [4]


def of_another_run(path: Path) -> None:
    damage(path, 0, label("two"))


def of_another_format(path: Path) -> None:
    damage(path, 0, label("one", 7))


def of_before_there_were_labels(path: Path) -> None:
    path.write_bytes(header(1, payload(1)) + payload(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_another_run, "is of the queue of run two, and this is run one; give this run a run_dir of its own"),
        (of_another_format, "is written in format 7, and this Miles reads 1; use the one that wrote it"),
        (of_before_there_were_labels, "is written in format 0, and this Miles reads 1"),
    ],
)
def test_a_journal_of_another_run_or_format_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    fill(tmp_path, 5)
    path, _ = place(tmp_path, 4)
    change(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for act in (lambda: reopen(tmp_path), lambda: salvage(tmp_path, "one")):
        with pytest.raises(Refused) as refused:
            act()
        assert f"{path} {words}" in str(refused.value) and f"move {tmp_path} aside" in str(refused.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_finds_the_disk_full_writes_again_what_is_left_and_names_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fill(tmp_path, 4)
    journal = Journal(str(tmp_path), SEGMENT, "one")
    journal.open()
    ids = [5, 6, 7, 8, 9]
    journal.write([], ids, [payload(id) for id in ids])
    path, at = tmp_path / f"{3:08d}.seg", LABEL + EACH + HEADER  # group 6
    fsync, pwrite, failed, again = os.fsync, os.pwrite, [], set[bytes]()

    def counted(handle: int, data: bytes, at: int) -> int:
        again.update(payload(id) for id in ids if payload(id) in bytes(data))
        return pwrite(handle, data, at)

    def forgetful(handle: int) -> None:
        if len(failed) < 2:
            if not failed:
                damage(path, at, b"\0" * 50)  # what the kernel gave up, and nobody will say so again
            failed.append(handle)
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", forgetful)
    monkeypatch.setattr(os, "pwrite", counted)
    assert [journal.sync()[1] for _ in range(2)] == [str(OSError(number, os.strerror(number)))] * 2
    assert journal.sync() == ([6], "")
    assert again == {payload(id) for id in (5, 7, 8, 9)}  # a second fsync alone would find nothing to write
    assert [bytes(data) for data in journal.read([1, 5, 7, 8, 9])] == [payload(id) for id in (1, 5, 7, 8, 9)]
    with pytest.raises(LookupError):
        journal.read([6])
    assert journal.write([], [6], [payload(6)]) == (1, "") and journal.sync() == ([], "")
    journal.close()
    assert reopen(tmp_path) == ([1, 2, 3, 4, 5, 7, 8, 9, 6], [])


def test_another_error_of_a_sync_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fill(tmp_path, 2)
    journal = Journal(str(tmp_path), SEGMENT, "one")
    journal.open()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        journal.sync()
    journal.close()


def test_a_mark_that_is_damaged_promises_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    damage(tmp_path / MARK, 9)
    damage(place(tmp_path, 2)[0], LABEL + EACH)
    assert reopen(tmp_path)[0] == [1]
