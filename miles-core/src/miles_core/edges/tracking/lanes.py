"""A stretch of a run's trace as SVG: a lane for each process, and what it did in it.

python -m miles_core.edges.tracking.lanes runs/reverse --out docs/timeline.svg --begin 20 --seconds 5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .curve import Scale, ticks
from .files import explained, replace
from .record import printable
from .trace import NAME

WIDTH, LEFT, RIGHT, TOP, LANE, GAP = 760, 92, 16, 62, 26, 10
SEVERAL = ("sample", "reward")  # what a process does many times at once: their number is drawn

# What makes tokens or learns from them is dark, what stands in its way is bright, and waiting is pale.
COLOURS = {
    "train": "#0b62c4",
    "sample": "#4c7a12",
    "reward": "#8a6d00",
    "serve": "#4c7a12",
    "sync": "#d9480f",
    "save": "#8250df",
    "write": "#8250df",
    "evaluate": "#0a7d8c",
    "wait": "#c8ced6",
    "sleep": "#e3b7c5",
}
OTHER = "#57606a"
STYLE = """
svg.lanes { font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
svg.lanes text { fill:#59636e; } svg.lanes text.title { fill:#1f2328; font-size:15px; font-weight:600; }
svg.lanes .paper { fill:#ffffff; } svg.lanes .grid { stroke:#d9dee3; }
"""


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the first event of the trace."""

    process: str
    doing: str
    began: float
    ended: float


def read(path: Path) -> list[Span]:
    """The spans of a trace, in their order. Raises OSError, and ValueError where it is no trace or has no span."""
    try:
        events = json.loads(path.read_text())
        names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        shown = [event for event in events if event["ph"] == "X"]
        first = min((event["ts"] for event in shown), default=0)
        spans = [
            Span(names[e["pid"]], e["name"], *((e["ts"] + add - first) / 1e6 for add in (0, e["dur"]))) for e in shown
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the trace of a run: {error!r}") from None
    if not spans:
        raise ValueError(f"{path} has no span yet")
    return spans


def draw(title: str, spans: Sequence[Span], begin: float, seconds: float) -> str:
    """The lanes of all processes from ``begin`` for so many seconds, as an <svg> element.

    Raises ValueError where nothing was done in that time.
    """
    shown = [span for span in spans if span.ended > begin and span.began < begin + seconds]
    if not shown:
        last = max(span.ended for span in spans)
        raise ValueError(f"nothing was done from {begin:g} to {begin + seconds:g} s; the trace ends at {last:.1f} s")
    x = Scale(begin, begin + seconds, LEFT, WIDTH - RIGHT)
    processes = sorted({span.process for span in shown})
    bottom = TOP + len(processes) * (LANE + GAP)
    parts = [_axis(x, bottom), _legend(dict.fromkeys(span.doing for span in shown))]
    for i, process in enumerate(processes):
        top = TOP + i * (LANE + GAP)
        parts.append(f'<text x="{LEFT - 8}" y="{top + LANE / 2}" dy=".32em" text-anchor="end">{_text(process)}</text>')
        mine = [span for span in shown if span.process == process]
        parts += [_box(span, x, top) for span in mine if span.doing not in SEVERAL]
        parts.append(_many([span for span in mine if span.doing in SEVERAL], x, top))
    told = f"<title>{_text(title)}</title><desc>{_text(', '.join(processes))}</desc>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lanes" role="img" viewBox="0 0 {WIDTH} {bottom + 34}" '
        f'aria-label="{_text(title)}">{told}<style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{bottom + 34}" rx="6"/>'
        f'<text class="title" x="{LEFT}" y="24">{_text(title)}</text>{"".join(parts)}</svg>'
    )


def _box(span: Span, x: Scale, top: float) -> str:
    began, ended = x(max(span.began, x.low)), x(min(span.ended, x.high))
    colour = COLOURS.get(span.doing, OTHER)
    return f'<rect x="{began:.2f}" y="{top}" width="{max(ended - began, 0.3):.2f}" height="{LANE}" fill="{colour}"/>'


def _many(spans: Sequence[Span], x: Scale, top: float) -> str:
    """How many groups were under way, as an area; its height is the most that were."""
    turns = sorted([(max(s.began, x.low), 1) for s in spans] + [(s.ended, -1) for s in spans if s.ended < x.high])
    if not turns:
        return ""
    counts, n = [], 0
    for at, change in turns:
        n += change
        counts.append((at, n))
    most = max(n for _, n in counts)
    y = Scale(0, most, top + LANE, top)
    points, before = [], 0
    for at, n in [*counts, (x.high, counts[-1][1])]:
        points += [f"{x(at):.2f},{y(before):.2f}", f"{x(at):.2f},{y(n):.2f}"]
        before = n
    points += [f"{x(x.high):.2f},{y(0):.2f}"]
    label = f'<text x="{LEFT + 4}" y="{top - 2}" font-size="9">at most {most} groups</text>'
    return f'<polygon fill="{COLOURS["sample"]}" opacity=".75" points="{" ".join(points)}"/>{label}'


def _axis(x: Scale, bottom: float) -> str:
    parts = []
    for mark in ticks(x.low, x.high, 8):
        if x.low <= mark <= x.high:
            at = f"{x(mark):.1f}"
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP - 4}" y2="{bottom}"/>')
            parts.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="middle">{mark:g} s</text>')
    return "".join(parts)


def _legend(doings: Iterable[str]) -> str:
    parts, left = [], float(LEFT)
    for doing in doings:
        parts.append(f'<rect x="{left}" y="34" width="12" height="12" fill="{COLOURS.get(doing, OTHER)}"/>')
        parts.append(f'<text x="{left + 16}" y="40" dy=".32em">{_text(doing)}</text>')
        left += 34 + 6.5 * len(doing)
    return "".join(parts)


def _text(text: str) -> str:
    return escape(printable(text))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lanes", description="Draw a stretch of a run's trace as one SVG file.")
    parser.add_argument("run", type=Path, help="a run folder, or its trace.json")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--begin", type=float, default=0.0, help="seconds since the first event")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long a stretch to draw")
    parser.add_argument("--title", default="What every process did", help="above the lanes")
    given = parser.parse_args(arguments)
    if given.seconds <= 0:
        parser.error(f"--seconds: {given.seconds:g} is not a length of time")
    try:
        picture = draw(
            given.title, read(given.run / NAME if given.run.is_dir() else given.run), given.begin, given.seconds
        )
        with explained(given.out, "the picture"):
            replace(given.out, picture + "\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
