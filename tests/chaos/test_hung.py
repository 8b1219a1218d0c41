"""Processes that are stopped, not killed: Ray holds them for alive, and what they had would never come back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chaos import LOOK_S, MILES, Chaos, rows
from test_chaos import RUN

STEPS, GROUPS, SILENCE_S = 8, 8, 30  # shorter, and a busy machine makes others look like it


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_goes_on_without_the_processes_that_hang() -> None:
    """One of each that the driver survives, all at once."""
    folder = Path(tempfile.mkdtemp(prefix="hung-", dir="/tmp"))  # short: Ray's sockets are below it
    subprocess.run([sys.executable, "-m", "miles_core.testing.reverse", str(folder / "data")], check=True)
    (folder / "run.toml").write_text(RUN.format(here=Path(__file__).parent, steps=STEPS, groups=GROUPS, of_each=1))
    chaos, due = Chaos(folder, [], ("--set", f"ray.silence_s={SILENCE_S}")), ["rollout", "engine", "queue"]
    chaos.start()
    try:
        while chaos.attend():  # starts it again where a busy machine was too slow for Ray
            found = chaos.processes()
            if chaos.step >= 2 and due and set(due) <= found.keys():
                for kind in due:
                    os.kill(found[kind][0], signal.SIGSTOP)
                due = []
            time.sleep(LOOK_S)
    finally:
        chaos.end()
    said = (folder / "driver.log").read_text()
    assert not due, said
    hung = re.findall(rf"(\S+) answered nothing for {SILENCE_S} s \(ray.silence_s\), and was killed", said)
    assert {"rollout-0", "engine-0", "queue"} <= set(hung), said
    assert [row["step"] for row in rows(folder / "run/metrics.jsonl") if row["step"]] == list(range(1, STEPS + 1))
    audit = subprocess.run([MILES, "audit", "run"], cwd=folder, capture_output=True, text=True)
    assert audit.returncode == 0 and f"{STEPS * GROUPS} trained" in audit.stdout, audit.stdout + audit.stderr
    assert re.search(r"returned .*rollout-0 died", audit.stdout), audit.stdout  # its leases came back
    shutil.rmtree(folder)
