"""A row of the table, how it is written, and how rows get from the process that measured them to the one that asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. What could not be measured has no value, and says why in ``note``."""

    name: str  # as --only has it; several rows may share one
    what: str
    value: float | None = None
    unit: str = ""
    ceiling: float | None = None  # in the same unit, measured in the same process, a moment before or after
    beside: str = ""  # what the ceiling is
    ratio: float | None = None  # of value and ceiling; the median of pairs where the two took turns
    bar: str = ""
    met: bool | None = None  # whether the bar is reached; None where there is none
    note: str = ""


Report = Callable[[Row], None]


def reporter(path: Path) -> Report:
    """Each row is in the file when the call returns, whatever becomes of the process then."""

    def report(row: Row) -> None:
        with path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(line(row), flush=True)

    return report


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(text)) for text in path.read_text().splitlines()] if path.exists() else []


def line(row: Row) -> str:
    cells = [
        row.what,
        _number(row.value, row.unit),
        _number(row.ceiling, row.unit) + (f" ({row.beside})" if row.beside else ""),
        "" if row.ratio is None else f"{row.ratio:.3f}",
        row.bar,
        {True: "yes", False: "no", None: ""}[row.met],
        row.note,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown(rows: Sequence[Row], machine: dict[str, str]) -> str:
    head = ["what", "measured", "ceiling", "ratio", "bar", "met", "note"]
    lines = ["# On GPUs", "", ", ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(line, rows)]
    return "\n".join(lines) + "\n"


def known(out: Path, machine: dict[str, str]) -> list[Row]:
    """What is in ``out``.json, if anything. Raises SystemExit where that is of another machine or other versions."""
    path = out.with_suffix(".json")
    if not path.exists():
        return []
    told = json.loads(path.read_text())
    if apart := [key for key in told["machine"] | machine if told["machine"].get(key) != machine.get(key)]:
        if apart != ["GPUs"]:
            raise SystemExit(f"{path} was measured with other {', '.join(apart)}; give another --out")
    return [Row(**row) for row in told["rows"]]


def write(out: Path, rows: Sequence[Row], machine: dict[str, str]) -> None:
    """``out``.md and ``out``.json, whole after every row, so that a run cut short keeps what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(markdown(rows, machine))
    told = {"machine": machine, "rows": [asdict(row) for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {unit}".strip()
