"""Checkpoints as folders: written aside, made durable, renamed; checked by size and checksum before they are used."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..identity import run_id
from ..lasting import Ledger, RunState
from ..room import naming, sync
from .ledger import Ledger as Log

WHOLE = "whole.json"  # size and crc32 of every other file; written last


class RunFolder:
    def __init__(self, run_dir: Path, keep: int, keep_every: int = 0) -> None:
        """The newest ``keep`` checkpoints stay, and each whose step is a multiple of ``keep_every``, if that is set."""
        self._dir, self._keep, self._keep_every = run_dir, keep, keep_every

    def claim(self, resume: bool) -> Path | None:
        aside = None
        if not resume and self._dir.is_dir() and any(self._dir.iterdir()):
            aside = next(p for n in range(1, 10**6) if not (p := self._dir.with_name(f"{self._dir.name}.{n}")).exists())
            self._dir.rename(aside)
        self._dir.mkdir(parents=True, exist_ok=True)
        probe = self._dir / ".writable"  # a folder that cannot be written is found out before anything starts
        probe.write_text("probe")
        probe.unlink()
        return aside

    def ledger(self, say: Callable[[str], None]) -> Ledger:
        """Its log is of this run folder's: the id that both have is drawn when the folder is first used."""
        return Log(self._dir / "ledger", run_id(self._dir), say)

    def begin(self, step: int) -> Path:
        folder = self._dir / "checkpoints" / f"writing-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, state: RunState) -> Path:
        final = folder.parent / f"step-{state.step:06d}"
        with naming(folder):
            if folder.exists():  # else it was asked before, and only its name was not durable yet
                self._complete(folder, state)
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
            for path in (final.parent, self._dir):
                sync(path)
        for old in self._folders()[self._keep :]:
            if not self._keep_every or _step(old) % self._keep_every:
                shutil.rmtree(old)
        return final

    def _complete(self, folder: Path, state: RunState) -> None:
        """Add the state, and what tells that all is there; all of it to the disk itself."""
        (folder / WHOLE).unlink(missing_ok=True)  # of an attempt on a full disk
        (folder / "state.pkl").write_bytes(pickle.dumps(state))
        sums = {str(path.relative_to(folder)): _sum(path) for path in _files(folder)}
        (folder / WHOLE).write_text(json.dumps(sums, indent=1))
        for path in (*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder):
            sync(path)

    def newest(self, say: Callable[[str], None]) -> tuple[Path, RunState] | None:
        for folder in self._folders():
            if fault := _fault(folder):
                say(f"{folder} is not whole ({fault}); looking at the one before")
                continue
            state = pickle.loads((folder / "state.pkl").read_bytes())
            assert isinstance(state, RunState)
            return folder, state
        return None

    def _folders(self) -> list[Path]:
        """Newest first."""
        found = [path for path in (self._dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _fault(folder: Path) -> str | None:
    """What is missing or changed in a checkpoint, or None when it is whole."""
    try:
        sums: dict[str, list[int]] = json.loads((folder / WHOLE).read_text())
    except (OSError, ValueError) as error:
        return f"{WHOLE}: {error}"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected[0]:
            return f"{name} has {size} bytes of {expected[0]}"
        if _sum(path) != expected:
            return f"{name} has changed since it was written"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sum(path: Path) -> list[int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]
