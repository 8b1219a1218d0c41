"""report.html: one file that needs no network, no script and nothing else of the run folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..room import Room
from .curve import STYLE, Curve, draw, spark
from .files import explained, replace
from .metrics import History
from .record import WHOLE, Record, duration, number, printable, timing

if TYPE_CHECKING:
    from jinja2 import Template

NAME = "report.html"
LIBRARIES = ("torch", "megatron-core", "ray", "transformers", "sglang")

# Title, the metrics in one picture (a name that ends in * stands for every metric that starts so, one picture each),
# and the range to show at the least.
PANELS: tuple[tuple[str, tuple[str, ...], tuple[float, float] | None], ...] = (
    ("Reward", ("reward/mean",), None),
    ("Held-out accuracy", ("eval/accuracy",), (0.0, 1.0)),
    ("Loss", ("loss",), None),
    ("KL", ("kl*",), None),
    ("Entropy", ("entropy*",), None),
    ("Tokens per second", ("tokens_per_s",), (0.0, 0.0)),
    ("Staleness, in versions of the weights", ("staleness/max", "staleness/mean"), (0.0, 1.0)),
    (
        "Utilization: the trainer trained, engines had requests running, anything was being sampled",
        ("utilization/trainer", "utilization/engines", "utilization/rollouts"),
        (0.0, 1.0),
    ),
    ("Gradient norm", ("grad_norm",), None),
    ("Response length, in tokens", ("rollout/length",), None),
)


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    svg: str
    note: str  # what the picture cannot show


@dataclass(frozen=True, slots=True)
class Row:
    """One metric in the table of all of them."""

    name: str
    first: str
    last: str
    low: str
    high: str
    svg: str


def write(record: Record, room: Room) -> Path:
    """Write the report of a run so far into its folder; returns its path. Raises OSError naming the file."""
    path, text = record.run_dir / NAME, render(record)
    with explained(path, "the report"):
        room.insist(path, lambda full: replace(path, text))
    return path


@cache
def template() -> Template:
    """Of the page, compiled once; every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finish(value: object) -> object:
        return printable(value, "\n\t") if type(value) is str else value  # Markup, a str of its own type, is ours

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finish
    )
    page.filters |= {"svg": Markup, "number": number}
    made: Template = page.get_template("report.html.j2")
    return made


def render(record: Record) -> str:
    """The report as HTML."""
    from markupsafe import Markup

    return template().render(
        record=record,
        style=Markup(STYLE),
        name=record.run_dir.absolute().name,
        figures=list(figures(record)),
        panels=list(panels(record.history)),
        phases=timing(record),
        usage=[*record.usage.rows(), *running(record.history)],
        whole=WHOLE,
        rows=list(table(record.history)),
        config=settings(record.run_dir / "config.json") or list(flat(record.run.model_dump(mode="json"))),
        versions=dict(settings(record.run_dir / "manifest.json")) | libraries(),
    )


def figures(record: Record) -> Iterator[tuple[str, str, str]]:
    """What matters most: a label, the number, and what it started from."""
    for key, label in (("reward/mean", "reward"), ("eval/accuracy", "held-out accuracy")):
        if ends := record.history.ends(key):
            yield label, f"{ends[1]:.3f}", f"from {ends[0]:.3f}"
    yield "steps", f"{record.step:,}", f"of {record.run.steps:,}"
    yield "time", duration(record.seconds), "after start-up"
    if (speed := record.history.get("tokens_per_s")) is not None:
        middle = sorted(speed.values)[len(speed.values) // 2]
        yield "tokens per second", f"{middle:,.0f}", "the median step"


def panels(history: History) -> Iterator[Panel]:
    for title, names, within in PANELS:
        if names[0].endswith("*"):
            stem = names[0][:-1]
            for name in sorted(n for n in history.series if n == stem or n.startswith((f"{stem}/", f"{stem}_"))):
                yield from _panel(history, f"{title}: {name}" if name != stem else title, (name,), within)
        else:
            yield from _panel(history, title, names, within)


def _panel(history: History, title: str, names: tuple[str, ...], within: tuple[float, float] | None) -> Iterator[Panel]:
    curves = [Curve(name, series) for name in names if (series := history.get(name))]
    gaps = sum(history.series[name].gaps for name in names if name in history.series)
    note = f"Not finite, so not drawn: {gaps:,} values." if gaps else ""
    if curves or gaps:
        yield Panel(title, draw(title, curves, within) if curves else "", note)


def running(history: History) -> Iterator[tuple[str, str, str]]:
    """A row beside those of what processes did: that engines serve does not say that anybody asks them."""
    shares, lengths = (history.get(name) for name in ("utilization/engines", "time/step"))
    if shares and lengths:
        seconds = dict(zip(lengths.steps, lengths.values, strict=True))
        pairs = [(share, seconds.get(step, 0.0)) for step, share in zip(shares.steps, shares.values, strict=True)]
        whole = sum(length for _, length in pairs)
        if whole:
            mean = sum(share * length for share, length in pairs) / whole
            yield "all engines", "have requests running", f"{mean:.1%}"


def table(history: History) -> Iterator[Row]:
    for name in sorted(history.series):
        if series := history.get(name):
            first, last, low, high = series.values[0], series.values[-1], min(series.values), max(series.values)
            yield Row(name, number(first), number(last), number(low), number(high), spark(series))


def settings(path: Path) -> list[tuple[str, str]]:
    """The leaves of a JSON file the run wrote, as dotted keys; none where there is no such file."""
    try:
        return list(flat(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return []


def flat(tree: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, tree if isinstance(tree, str) else json.dumps(tree)


def libraries() -> dict[str, str]:
    """Versions of what a run stands on, read without importing any of it."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
