"""Files of rows with random access. A row stays in its file until it is asked for."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...types import Refused

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")


class Rows(Protocol):
    """The rows of one file, in its order."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row:
        """Raises Refused, naming the place, when the row cannot be read."""
        ...

    def where(self, row: int) -> str:
        """``file:line``, or the file and the number of the row."""
        ...

    def scan(self) -> Iterator[Row | Refused]:
        """Every row in order, or what is wrong with it; constant memory."""
        ...


def open_rows(path: Path) -> Rows:
    """The rows of ``path`` by its suffix. Raises Refused when it cannot be read at all."""
    if path.suffix not in SUFFIXES:
        raise Refused(f"{path}: rows are read from {' and '.join(SUFFIXES)}, and the name tells which")
    try:
        return JsonLines(path) if path.suffix == ".jsonl" else Parquet(path)
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror or error}") from None


class JsonLines:
    """One JSON object a line; blank lines are passed over. Keeps 16 bytes a row: where it starts and its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._starts, self._lines = array("q"), array("q")
        end = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self._starts.append(end)
                    self._lines.append(number)
                end += len(line)
        self._starts.append(end)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        return f"{self.path}:{self._lines[row]}"

    def __getitem__(self, row: int) -> Row:
        start, end = self._starts[row], self._starts[row + 1]
        line = os.pread(self._file, end - start, start)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(f"{self.where(row)}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError as error:
            raise Refused(f"{self.where(row)}: not UTF-8: byte {error.start} of the line") from None
        if not isinstance(value, dict):
            raise Refused(f"{self.where(row)}: a row must be a JSON object, this is {type(value).__name__}")
        return value

    def scan(self) -> Iterator[Row | Refused]:
        for row in range(len(self)):
            try:
                yield self[row]
            except Refused as error:
                yield error


class Parquet:
    """A table in columnar memory, decoded once and on first use; only the rows asked for become Python objects."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path = path
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise Refused(f"{path}: not a parquet file: {error}") from None
        self._table: pyarrow.Table | None = None

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"

    def __getitem__(self, row: int) -> Row:
        import pyarrow

        if self._table is None:
            try:
                self._table = self._file.read()
            except (OSError, pyarrow.ArrowException) as error:
                raise Refused(f"{self.path}: cannot be read: {error}") from None
        rows: list[Row] = self._table.slice(row, 1).to_pylist()
        return rows[0]

    def scan(self) -> Iterator[Row | Refused]:
        import pyarrow

        try:
            for batch in self._file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            yield Refused(f"{self.path}: cannot be read: {error}")
