"""However a driver ends, nothing that it started is left; two drivers at once do not meet."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cluster_targets
import pytest
from miles_core.edges.cluster import leash

PATIENCE_S = 15
# How a driver ends: what is sent to it (a line on stdin where no signal is), and the status it ends with.
ENDINGS = {
    "close": (None, 0),
    "error": (None, 1),
    "leave": (None, 0),
    "abandon": (None, 5),
    "interrupt": (signal.SIGINT, -signal.SIGINT),
    "terminate": (signal.SIGTERM, -signal.SIGTERM),
    "cancel": (signal.SIGTERM, 1),
    "kill": (signal.SIGKILL, -signal.SIGKILL),
}


@contextmanager
def drive(ending: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver; one that is still there when the test is not, as where that failed, has nothing to spin for."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, cluster_targets.__file__, ending, str(run_dir)],
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(run_dir / "t")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(run_dir / "stderr").open("w"),
        text=True,
        start_new_session=True,  # a signal to its group, as a terminal sends it, is for this driver alone
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [("close", "kill"), ("error", "interrupt"), ("leave", "terminate"), ("cancel", "abandon")]
)
def test_nothing_is_left(pair):
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as base, ExitStack() as stack:
        folders = {ending: Path(base, ending) for ending in pair}
        for folder in folders.values():
            (folder / "t").mkdir(parents=True)
        drivers = {ending: stack.enter_context(drive(ending, folder)) for ending, folder in folders.items()}
        trees = {}
        for ending, driver in drivers.items():
            assert driver.stdout.readline() == "ready\n", (folders[ending] / "stderr").read_text()
            trees[ending] = {pid: since for pid in leash.descendants(driver.pid) if (since := leash.born(pid))}
        assert not set(trees[pair[0]]) & set(trees[pair[1]])
        for ending, driver in drivers.items():
            # the leash, five or more of Ray's, two processes alive and the two children of one
            assert len(trees[ending]) >= 10
            sent, status = ENDINGS[ending]
            if sent is None:
                rest, _ = driver.communicate("go on\n", timeout=60)
            else:
                (os.killpg if sent == signal.SIGINT else os.kill)(driver.pid, sent)
                rest, _ = driver.communicate(timeout=60)
            assert rest == ""  # nothing of Ray's into the middle of a progress line, though a process died
            assert driver.returncode == status, (folders[ending] / "stderr").read_text()
            deadline, alive = time.monotonic() + PATIENCE_S, trees[ending]
            while alive and time.monotonic() < deadline:
                alive = {pid: since for pid, since in alive.items() if leash.born(pid) == since}
                time.sleep(0.02)
            assert not [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive]
            assert not list((folders[ending] / "t").iterdir())  # Ray's own files are gone too
            assert sorted(log.name for log in (folders[ending] / "logs").iterdir()) == [
                "one.log",
                "three.log",
                "two.log",
            ]


def apart() -> list[str]:
    """What keeps a command from seeing the machine's other processes, and a Ray among them that it would join."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    may = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if may else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "problem"), [("auto", "no Ray to join"), ("127.0.0.1", "did not answer within 10 s")]
)
def test_no_ray_where_it_should_be(address, problem, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # listens, and says nothing
        address += f":{deaf.getsockname()[1]}" * (address != "auto")
        command = [*apart(), sys.executable, cluster_targets.__file__, address, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"ray.address = {address!r}" in done.stdout and problem in done.stdout
