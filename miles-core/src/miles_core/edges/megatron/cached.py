"""A frozen model whose log-probabilities are kept on disk, so that each sequence is computed once, in whatever run.

Kept are the log-probabilities of whole sequences, by a digest of their tokens, under a digest of the weights. Every
rank holds the same table, so all ranks of a replica agree on what is missing without asking each other; the model
itself is built when something is missing for the first time, and never where nothing is.
"""

from __future__ import annotations

import sqlite3
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from ...types import Batch, Layout, Output, Refused
from ..protocols import Forward
from . import device
from .model import MegatronModel, layout

BLOCK, STRIDE = 4 << 10, 1 << 20  # of a weights file, so much is read of every so many bytes
SMALL = 64 << 20  # and all of it up to this size, where the stride could miss every weight
WAIT_S = 60  # seconds for another run's turn to end; it lasts as long as a step's sequences take to be written
_BROKEN = "{} is damaged ({}); delete it: what it held is computed again"


def digest(folder: Path, args: Namespace) -> str:
    """Of the weights and the precision they are used in. A changed weight of a trained model changes all of them."""
    found = blake2b(f"bf16={args.bf16}".encode(), digest_size=16)
    for path in sorted(p for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors"):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in range(0, size, STRIDE if size > SMALL else BLOCK):
                file.seek(at)
                found.update(file.read(BLOCK))
    return found.hexdigest()


class CachedModel:
    """See ``types.Model``. ``run`` takes no loss."""

    def __init__(self, name: str, folder: Path, identity: str, build: Callable[[], MegatronModel]) -> None:
        self.name, self._build = name, build
        self._model: MegatronModel | None = None
        self.layout: Layout = layout()
        self._writes = self.layout.reports and self.layout.dp_rank == 0
        self._file = folder / f"{identity}.sqlite"
        self._table = self._everywhere(self._read() if self._writes else {})

    def run(self, batches: list[Batch], forward: Forward, loss: Callable[..., Tensor] | None) -> list[Output]:
        """See ``types.Model.run``."""
        if loss is not None:
            raise ValueError(f"{self.name} is frozen, so it cannot be run with a loss; make it Role(trained=True)")
        keys = [_keys(batch) for batch in batches]
        missing = [i for i, mine in enumerate(keys) if not self._table.keys() >= set(mine)]
        new: dict[bytes, np.ndarray[Any, Any]] = {}
        if self._anyone(bool(missing)):
            self._model = self._model or self._build()
            outputs = self._model.run([batches[i] for i in missing], forward, None) if missing else []
            for i, output in zip(missing, outputs, strict=False):  # none off the last stage
                assert output.logprobs is not None
                new |= dict(zip(keys[i], _cut(output.logprobs, batches[i]), strict=True))
            self._keep(new, {key for i in missing for key in keys[i]})
        if not self.layout.last_stage:
            return []
        return [self._output(mine, batch) for mine, batch in zip(keys, batches, strict=True)]

    def _output(self, keys: list[bytes], batch: Batch) -> Output:
        rows = [self._table[key] for key in keys]
        whole = np.concatenate(rows) if rows else np.zeros(0, np.float32)
        return Output(logprobs=torch.from_numpy(whole).to(batch.tokens.device))

    def _keep(self, new: dict[bytes, Any], known: set[bytes]) -> None:
        """Into every rank's table; off the last stage only that it is known. One rank writes it down."""
        shares: list[Any] = [None] * mpu.get_data_parallel_world_size()
        mine = new or dict.fromkeys(known)
        with device.running():
            dist.all_gather_object(shares, mine, group=mpu.get_data_parallel_group())
        found = {key: row for share in shares for key, row in share.items()}
        self._table |= found
        if self._writes:
            with _named(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            with _database(self._file) as database:
                rows = ((key, row.tobytes()) for key, row in found.items())
                database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)

    def _read(self) -> dict[bytes, Any]:
        if not self._file.exists():
            return {}
        with _database(self._file) as database:
            rows = database.execute("SELECT key, logprobs FROM rows").fetchall()
        try:
            return {key: np.frombuffer(row, np.float32) for key, row in rows}
        except (TypeError, ValueError):
            raise Refused(_BROKEN.format(self._file, "a row is no array")) from None

    def _everywhere(self, table: dict[bytes, Any]) -> dict[bytes, Any]:
        """The table of the rank that writes."""
        tables: list[Any] = [None] * dist.get_world_size()
        with device.running():
            dist.all_gather_object(tables, table)
        return next((found for found in tables if found), {})

    def _anyone(self, yes: bool) -> bool:
        flag = torch.tensor([float(yes)], device="cuda" if device.has_gpu() else "cpu")
        with device.running():
            dist.all_reduce(flag)
        return bool(flag.item())

    def total(self, tensor: Tensor) -> Tensor:
        """See ``types.Model.total``."""
        raise NotImplementedError(f"{self.name} computes no loss")

    def memory(self) -> str:
        """See ``types.Model.memory``."""
        return self._model.memory() if self._model else f"{self.name} is built when a sequence is new"

    def step(self, veto: Callable[[float], str | None]) -> tuple[dict[str, float], str | None]:
        """Raises ValueError: it is frozen."""
        raise ValueError(f"{self.name} is frozen, so it has no optimizer to step; make it Role(trained=True)")

    def save(self, folder: Path) -> Callable[[], None]:
        """Nothing of it changes."""
        return lambda: None

    def load(self, folder: Path) -> None:
        """Nothing of it changes."""

    def save_hf(self, folder: Path) -> None:
        """Raises ValueError: it is what it was."""
        raise ValueError(f"{self.name} is frozen; copy its folder")


@contextmanager
def _database(file: Path) -> Iterator[sqlite3.Connection]:
    """Its one table is there; what was written counts unless something was raised. Runs that share it take turns."""
    with _named(file), closing(sqlite3.connect(file, timeout=WAIT_S)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, logprobs BLOB)")
        yield database


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Raises Refused, with the file and what to do about it, where SQLite or the disk says no."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise Refused(f"{file} cannot be read or written ({error}); look at its disk and its rights") from None
        what = f"another run that shares it has held it for {WAIT_S} s"
        raise Refused(f"{file} is locked: {what}; resume when that is done, or name a folder of its own") from None
    except sqlite3.DatabaseError as error:
        raise Refused(_BROKEN.format(file, error)) from None
    except OSError as error:
        raise Refused(f"{file} cannot be written ({error.strerror}); look at its disk and its rights") from None


def _keys(batch: Batch) -> list[bytes]:
    """A digest of each sequence: its tokens, which of them count, and the temperature."""
    source = batch.host or batch
    tokens, mask = (np.asarray(getattr(source, name)) for name in ("tokens", "mask"))
    starts = batch.starts.tolist() if batch.host is None else [0, *np.cumsum(batch.host.lengths).tolist()]
    salt = str(batch.temperature).encode()
    return [
        blake2b(tokens[a:b].tobytes() + mask[a:b].tobytes(), digest_size=16, key=salt).digest()
        for a, b in zip(starts, starts[1:], strict=False)
    ]


def _cut(logprobs: Tensor, batch: Batch) -> list[np.ndarray[Any, Any]]:
    starts = batch.starts.tolist()
    whole = logprobs.numpy(force=True)
    return [whole[a:b].copy() for a, b in zip(starts, starts[1:], strict=False)]
