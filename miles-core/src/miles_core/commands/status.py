"""``miles status``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..edges.store.ledger.book import DROPPED, STATES, TRAINER, WORKER, Book
from ..edges.store.ledger.lines import NAME
from ..edges.store.ledger.replay import Replay


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Say where every prompt of the run in folder RUN is. Reads only, while it runs and after it crashed."""
    path = run / "ledger" / NAME
    replay = Replay(path)
    click.echo(f"{path}: {replay.reader.number} records{_age(replay)}")
    if replay.reader.rest:
        click.echo("the last record is half there: it is being written, or will be cut when the run goes on")
    book = replay.book
    click.echo(f"{book.cursor} prompts taken, step {book.step} trained" if book.cursor else "no prompt was taken yet")
    for state, name in enumerate(STATES[1:], 1):
        click.echo(f"  {name:<8} {book.counts[state]:>9,}  {_more(book, state)}".rstrip())


def _age(replay: Replay) -> str:
    """How old the last record is. Clocks may be set, so it may be wrong; nothing else depends on it."""
    if "at" not in replay.last:
        return ""
    return f", the last one {max(time.time() - replay.last['at'], 0):.0f} s old"


def _more(book: Book, state: int) -> str:
    """Who holds the prompts of a state, or why they are in it, the most first."""
    if state == DROPPED:
        parts = {reason: n for reason, n in book.reasons.items()}
    elif state in (WORKER, TRAINER):
        word = "step " if state == TRAINER else ""
        parts = {f"{word}{name}": len(ids) for name, ids in book.by(state).items()}
    else:
        return ""
    return ", ".join(f"{name}: {n:,}" for name, n in sorted(parts.items(), key=lambda item: (-item[1], item[0])))
