"""How fast the ledger writes records, and how long one of a long run takes to open, in time of one processor.

Every prompt is leased and queued in a record of its own, which is the most records a run can write; each step gives 48
of 64 prompts to the trainer and drops the others. ``python benchmarks/ledger.py --prompts 1000000``
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from miles_core.edges.store.ledger import Ledger
from miles_core.edges.store.ledger.audit import audit


def write(folder: Path, prompts: int) -> Ledger:
    """A run over so many prompts, which syncs every hundred steps as for a checkpoint."""
    ledger, step, order = Ledger(folder, "bench", print), 0, random.Random(0)
    while ledger.cursor < prompts:
        for n in range(64):
            ledger.lease([ledger.next()], f"rollout-{n % 8}")
        ids = list(range(ledger.cursor - 63, ledger.cursor + 1))
        order.shuffle(ids)
        for id in ids:
            ledger.queue([id])
        step += 1
        ledger.drop(ids[:16], "all the same")
        ledger.give(ids[16:], step)
        ledger.trained(step)
        if step % 100 == 0:
            ledger.sync()
    return ledger


def timed[T](act: Callable[[], T]) -> tuple[T, float, float]:
    """What it answers, the seconds of one processor that it took, and those of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    return act(), time.process_time() - processor, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200_000)
    prompts = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "run" / "ledger"
        ledger, processor, clock = timed(lambda: write(folder, prompts))
        records, size = ledger.position, ledger.path.stat().st_size
        rows = [("write", processor, clock)]
        ledger.close()
        again, processor, clock = timed(lambda: Ledger(folder, "bench", print))
        rows.append(("open", processor, clock))
        _, processor, clock = timed(lambda: again.rewind(records // 2, 10**9, ()))
        rows.append(("rewind to the middle", processor, clock))
        again.close()
        _, processor, clock = timed(lambda: audit(ledger.path))
        rows.append(("audit", processor, clock))
    print(f"{prompts:,} prompts, {records:,} records, {size / 1e6:.0f} MB\n")
    print("| | processor, s | clock, s | records a second of processor |\n| --- | --- | --- | --- |")
    for name, processor, clock in rows:
        read = records // 2 if "middle" in name else records
        print(f"| {name} | {processor:.1f} | {clock:.1f} | {read / processor:,.0f} |")


if __name__ == "__main__":
    main()
