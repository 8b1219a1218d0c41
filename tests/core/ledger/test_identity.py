"""The id of a run: drawn once, and on the disk before anything else has it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from miles_core.edges.identity import NAME, run_id


def test_it_is_drawn_once_and_is_another_one_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    drawn = run_id(tmp_path)
    assert drawn == run_id(tmp_path) != run_id(tmp_path / "other")
    assert 0 < len(drawn) <= 32 and [path.name for path in tmp_path.iterdir() if path.is_file()] == [NAME]


def test_a_power_cut_at_any_moment_leaves_all_of_it_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a disk is asked: the bytes, then the name, then the folder that has it."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        assert folder or os.fstat(handle).st_size == 12, "synced before it was written"
        assert not (tmp_path / NAME).exists() or folder
        done.append("folder" if folder else "bytes")
        fsync(handle)

    def renamed(path: Path, to: Path) -> Path:
        done.append("name")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    run_id(tmp_path)
    assert done == ["bytes", "name", "folder"]


def test_a_draft_that_a_crash_left_is_nobodys_id(tmp_path: Path) -> None:
    (tmp_path / NAME).with_suffix(".draft").write_text("half")
    assert run_id(tmp_path) == run_id(tmp_path) != "half"
