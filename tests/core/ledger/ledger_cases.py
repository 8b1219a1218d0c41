"""A ledger with a bit of everything in it, and what each byte of its log is."""

from pathlib import Path

from miles_core.edges.store.ledger import Ledger


def open_ledger(run: Path, said=None, name="one"):
    return Ledger(run / "ledger", name, (said if said is not None else []).append)


def live_through(ledger, rounds=3):
    """Rounds of eight prompts, through every state; returns the position after each round."""
    positions = []
    for step in range(1, rounds + 1):
        ids = []
        for i in range(8):
            ids.append(ledger.next())
            ledger.lease(ids[-1:], f"rollout-{i % 2}")
        ledger.back(ids[6:], "its worker died")
        ledger.queue(ids[:6])
        ledger.drop(ids[:2], "all the same")
        ledger.give(ids[2:5], step)
        ledger.trained(step)
        positions.append(ledger.position)
    return positions


def view(ledger):
    """All that can be asked of a ledger."""
    return (
        ledger.position,
        ledger.cursor,
        ledger.next(),
        ledger.counts(),
        ledger.reasons(),
        [ledger.where(id) for id in range(1, ledger.cursor + 2)],
    )


def lines(ledger):
    return ledger.path.read_bytes().splitlines(keepends=True)
