"""Curves as SVG, drawn here so that a report needs no script, no network and no plotting library.

python -m miles_core.edges.tracking.curve runs/reverse --out docs/reverse.svg --keys reward/mean eval/accuracy
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...config import suggest
from .files import explained, replace
from .metrics import NAME, History, Series, read
from .record import number, printable

WIDTH, HEIGHT = 540, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 34  # margins around the plot, for the labels
POINTS = 160  # drawn at most; more steps than that become means, with the range of each behind them
TINY, HUGE = 1e-200, 1e200  # a diverged run must not break the picture of how it got there
MARKED = 24  # as many points, or fewer, are marked one by one

# Both schemes meet the 4.5:1 contrast for text; lines also differ by dashes, so that colour alone tells nothing.
STYLE = """
svg.curve { --ink:#1f2328; --faint:#59636e; --grid:#d9dee3; --paper:#ffffff; --c0:#0b62c4; --c1:#b3430f; --c2:#4c7a12;
  font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
@media (prefers-color-scheme:dark) { svg.curve { --ink:#e6edf3; --faint:#9aa5b1; --grid:#30363d; --paper:#0d1117;
  --c0:#6cb0ff; --c1:#ff9d66; --c2:#9ccc4f; } }
svg.curve text { fill:var(--faint); } svg.curve text.title { fill:var(--ink); font-size:15px; font-weight:600; }
svg.curve .grid { stroke:var(--grid); } svg.curve .line { fill:none; stroke-width:2; stroke-linejoin:round; }
svg.curve .band { opacity:.18; } svg.curve .hit { fill:transparent; } svg.curve .hit:hover { fill:var(--ink); }
svg.curve .paper { fill:var(--paper); }
"""
DASHES = ("", "6 4", "2 3")


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    series: Series


@dataclass(frozen=True, slots=True)
class Point:
    """The mean over some neighbouring steps, and the range of their values."""

    step: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(title: str, curves: Sequence[Curve], within: tuple[float, float] | None = None, alone: bool = False) -> str:
    """One picture of one to three curves over their steps, as an <svg> element.

    ``within`` is a range of values to show at the least. ``alone`` makes a file of its own: it brings its style,
    a background and its title; an element within a page expects ``STYLE`` there.
    """
    drawn = [(curve, condense(curve.series)) for curve in curves]
    points = [point for _, some in drawn for point in some]
    top = TOP + (26 if alone else 0) + (20 if len(curves) > 1 else 0)
    values = [p.low for p in points] + [p.high for p in points] + list(within or ())
    marks = ticks(min(values), max(values), 5)
    first, last = min(p.step for p in points), max(p.step for p in points)
    x = Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    height = HEIGHT + top - TOP
    y = Scale(marks[0], marks[-1], height - BOTTOM, top)
    parts = [_axes(x, y, marks)]
    for i, (curve, some) in enumerate(drawn):
        parts.append(_curve(i, curve.label, some, x, y, hover=not alone))
    if len(curves) > 1:
        parts.append(_legend([curve.label for curve in curves], top - 14))
    told = f"<title>{_text(title)}</title><desc>{_text('; '.join(map(_told, curves)))}</desc>"
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>' if alone else ""
    head = f'<text class="title" x="{LEFT}" y="24">{_text(title)}</text>' if alone else ""
    style = f"<style>{STYLE}</style>" if alone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-label="{_text(title)}">{told}{style}{paper}{head}{"".join(parts)}</svg>'
    )


def spark(series: Series) -> str:
    """A curve without axes, the height of a line of text."""
    points = condense(series, 60)
    low, high = _spread(min(p.value for p in points), max(p.value for p in points))
    x = Scale(points[0].step, max(points[-1].step, points[0].step + 1), 1, 119)
    y = Scale(low, high, 19, 3)
    return (
        '<svg class="curve spark" aria-hidden="true" viewBox="0 0 120 22">'
        f'<polyline class="line" stroke="var(--c0)" points="{_path(points, x, y)}"/></svg>'
    )


def condense(series: Series, limit: int = POINTS) -> list[Point]:
    """At most ``limit`` points: every step where they fit, else means of as many neighbours."""
    size = -(-len(series.values) // limit)
    points = []
    for i in range(0, len(series.values), size):
        steps, values = series.steps[i : i + size], [min(max(v, -HUGE), HUGE) for v in series.values[i : i + size]]
        low, high = min(values), max(values)
        mean = min(max(math.fsum(v / len(values) for v in values), low), high)
        points.append(Point(sum(steps) / len(steps), mean, low, high))
    return points


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers whose first is at most ``low`` and whose last is at least ``high``."""
    low, high = _spread(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, end + 1)]


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range to draw on: that of the values, or one around them where they are all but equal."""
    size = max(abs(low), abs(high))
    if high - low > max(size * 1e-9, TINY):
        return low, high
    room = size * 0.1 if size > TINY else 1.0
    return low - room, high + room


def _axes(x: Scale, y: Scale, marks: list[float]) -> str:
    parts = []
    step = marks[1] - marks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if 0 < decimals <= 4 and round(step * 10**decimals, 6) % 1:
        decimals += 1  # steps of 0.25
    for mark in marks:
        at = f"{y(mark):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        label = _tick(mark, decimals)
        parts.append(f'<text x="{LEFT - 8}" y="{at}" dy=".32em" text-anchor="end">{label}</text>')
    for mark in ticks(x.low, x.high, 6):
        if x.low <= mark <= x.high and mark == round(mark):
            at = f"{x(mark):.1f}"
            parts.append(f'<text x="{at}" y="{y.start + 16}" text-anchor="middle">{mark:,.0f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{y.start + 30}" text-anchor="middle">step</text>')
    return "".join(parts)


def _tick(mark: float, decimals: int) -> str:
    if decimals > 4:
        return f"{mark:.2g}"
    return f"{mark:.3g}" if abs(mark) >= 1e7 else f"{mark + 0.0:,.{decimals}f}"


def _curve(i: int, label: str, points: list[Point], x: Scale, y: Scale, hover: bool) -> str:
    colour = f"var(--c{i % 3})"
    parts = []
    if any(p.high > p.low for p in points):
        upper = [f"{x(p.step):.1f},{y(p.high):.1f}" for p in points]
        lower = [f"{x(p.step):.1f},{y(p.low):.1f}" for p in reversed(points)]
        parts.append(f'<polygon class="band" fill="{colour}" points="{" ".join(upper + lower)}"/>')
    dash = f' stroke-dasharray="{DASHES[i % 3]}"' if DASHES[i % 3] else ""
    parts.append(f'<polyline class="line" stroke="{colour}"{dash} points="{_path(points, x, y)}"/>')
    if len(points) <= MARKED:
        parts += [f'<circle r="3" fill="{colour}" cx="{x(p.step):.1f}" cy="{y(p.value):.1f}"/>' for p in points]
    if hover:
        parts += [
            f'<circle class="hit" r="5" cx="{x(p.step):.1f}" cy="{y(p.value):.1f}">'
            f"<title>{_text(label)} at step {p.step:,.0f}: {number(p.value)}</title></circle>"
            for p in points
        ]
    return "".join(parts)


def _legend(labels: list[str], at: float) -> str:
    parts, left = [], float(LEFT)
    for i, label in enumerate(labels):
        dash = f' stroke-dasharray="{DASHES[i % 3]}"' if DASHES[i % 3] else ""
        parts.append(
            f'<line class="line" stroke="var(--c{i % 3})"{dash} x1="{left}" x2="{left + 24}" y1="{at}" y2="{at}"/>'
            f'<text x="{left + 30}" y="{at}" dy=".32em">{_text(label)}</text>'
        )
        left += 54 + 6.5 * len(label)
    return "".join(parts)


def _text(text: str) -> str:
    """``text`` as XML: markup escaped, and the control characters that no XML may hold."""
    return escape(printable(text))


def _path(points: list[Point], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in points)


def _told(curve: Curve) -> str:
    """The curve in words, for who does not see it."""
    s = curve.series
    ends = f"{number(s.values[0])} at step {s.steps[0]}, {number(s.values[-1])} at step {s.steps[-1]}"
    return f"{curve.label}: {ends}, between {number(min(s.values))} and {number(max(s.values))}"


def chosen(history: History, keys: Sequence[str]) -> list[Curve]:
    """The curves of ``keys``. Raises ValueError naming a key that no step reported."""
    curves = []
    for key in keys:
        if (series := history.get(key)) is None:
            raise ValueError(f"no step reported a number for {key!r}{suggest(key, history.series)}")
        curves.append(Curve(key, series))
    return curves


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="curve", description="Draw metrics of a run as one SVG file.")
    parser.add_argument("run", type=Path, help="a run folder, or its metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--keys", nargs="+", default=["reward/mean"], help="metrics to draw, three at most")
    parser.add_argument("--title", help="above the curves; the names of the metrics when left out")
    given = parser.parse_args(arguments)
    path = given.run / NAME if given.run.is_dir() else given.run
    if len(given.keys) > len(DASHES):
        parser.error(f"--keys: {len(given.keys)} metrics, of which one picture can show {len(DASHES)}")
    try:
        curves = chosen(read(path), given.keys)
        with explained(given.out, "the picture"):
            replace(given.out, draw(given.title or ", ".join(given.keys), curves, alone=True) + "\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
