"""``miles audit``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from ..edges.identity import run_id
from ..edges.queue.salvage import salvage as mend_queue
from ..edges.store.ledger.audit import Audit, audit
from ..edges.store.ledger.lines import NAME
from ..edges.store.ledger.salvage import salvage as mend
from ..types import Refused


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--salvage", is_flag=True, help="Put what can be read in the place of a damaged ledger or queue first.")
def command(run: Path, salvage: bool) -> None:
    """Prove from its ledger that the run in folder RUN lost no prompt and trained on none twice.

    Exits with 0 where that holds, with 1 and what is wrong where it does not, with 2 where the ledger is unreadable.
    """
    path = run / "ledger" / NAME
    if not path.is_file():
        raise Refused(f"no ledger is at {path}; is {run} the folder of a run?")
    if salvage:
        queue = run / "queue"
        said = [*mend(path), *(mend_queue(queue, run_id(run)) if queue.is_dir() else [])]
        click.echo("\n".join(said) + "\n")
    found = audit(path)
    for name, text in _summary(found):
        click.echo(f"{name:<12} {text}")
    for text in found.violations:
        click.echo(f"violation    {text}")
    if found.violations:
        raise SystemExit(1)
    but = "Of the records that are left: every" if found.lost else "Every"
    click.echo(f"\n{but} prompt was in exactly one state after every record; none was skipped, none trained twice.")


def _summary(found: Audit) -> list[tuple[str, str]]:
    states = Counter(state for state, _ in found.places.values())
    dropped = Counter(str(why) for state, why in found.places.values() if state == "dropped")
    again = sum(times - 1 for times in found.sampled.values())
    rows = [
        ("ledger", f"{found.reader.path}: {found.reader.number:,} records, {found.void():,} of them void"),
        ("prompts", f"{len(found.places):,} taken" + "".join(f", {n:,} {state}" for state, n in states.items())),
        ("dropped", _by(dropped)),
        ("returned", _by(found.returned)),
        ("regenerated", f"{again:,} times a prompt that had been sampled before was sampled again"),
        ("rewinds", f"{len(found.rewinds):,}"),
    ]
    for rewind in found.rewinds:
        text = f"record {rewind.number} to {rewind.position}, after step {rewind.step}: {rewind.kept:,} prompts kept"
        rows.append(("", f"{text}, {rewind.again:,} to sample again"))
    for first, last in found.lost:
        rows.append(("lost", f"records {first} to {last}, to damage: nothing is proven of what happened in them"))
    if size := len(found.reader.rest):
        rows.append(("torn", f"{size} bytes of a last record: it is being written, or is cut when the run goes on"))
    return rows


def _by(counts: Counter[str]) -> str:
    total = f"{counts.total():,}"
    return total + (": " + ", ".join(f"{why} {n:,}" for why, n in counts.most_common()) if counts else "")
