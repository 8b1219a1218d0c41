"""Whole runs on servers that speak SGLang's protocol, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sglang_model import FIRST
from together.whole_runs import processes_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

HERE, MILES = Path(__file__).parent, str(Path(sys.executable).with_name("miles"))
PACKAGE = {  # an installed SGLang, as far as Miles asks for it
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/utils.py": "from run_server import enter_group as init_custom_process_group\n",
    "sglang/launch_server.py": "from run_server import serve\n\nserve({dialect!r})\n",
    "sglang/srt/server_args.py": """\
class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path")
        parser.add_argument("--device")
""",
    "sglang-{dialect}.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: {dialect}\n",
}
WITNESS = '''\
"""Writes down every token that was drawn, and the version of the weights that drew it."""

import json

from miles_core import Plugin, hookimpl


class Witness(Plugin):
    @hookimpl
    def miles_group_end(self, group, dropped):
        with open("witness.jsonl", "a") as file:
            for sample in group.samples:
                drawn = [pair for *pair, mine in zip(sample.tokens, sample.versions, sample.mask) if mine]
                print(json.dumps(drawn), file=file)
'''
RUN = """\
algorithm = "grpo"
steps = {steps}
seed = 3
mode = "async"
plugins = ["./witness.py"]

[use]
engines = "sglang"
transport = "sglang"

[model]
path = "data/model"

[data]
train = "data/train.jsonl"

[reward.positions]
weight = 1.0

[batch]
groups = 4
group_size = 4
micro_tokens = 256

[rollout]
max_tokens = 24
max_staleness = 2

[checkpoint]
every = 4

[placement]
engines = 2

[sglang]
device = "cpu"
bucket_mib = 1
"""


@pytest.fixture
def folder(tmp_path: Path, dialect: str) -> Path:
    for name, text in PACKAGE.items():
        path = tmp_path / "installed" / name.format(dialect=dialect)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if "{dialect" not in text else text.format(dialect=dialect))
    subprocess.run([sys.executable, "-m", "miles_core.testing.reverse", tmp_path / "data"], check=True)
    (tmp_path / "witness.py").write_text(WITNESS)
    return tmp_path


def rows(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or half a line
        return []


def servers(folder: Path) -> list[int]:
    pids = [int(told.split()[0]) for told in processes_of(str(folder))]
    told = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return [pid for pid, words in told.items() if b"sglang.launch_server" in words and b"guard.py" not in words]


def test_a_run_whose_server_is_killed_goes_on_to_its_end_and_loses_nothing(folder: Path) -> None:
    steps = 16
    (folder / "run.toml").write_text(RUN.format(steps=steps))
    path = os.pathsep.join([str(folder / "installed"), str(HERE), os.environ.get("PYTHONPATH", "")])
    with (folder / "said").open("w") as said:
        run = subprocess.Popen(
            [MILES, "run", "run.toml", "--set", "run_dir=out"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while len(rows(folder / "out" / "metrics.jsonl")) < 4:
                assert run.poll() is None, (folder / "said").read_text()
                time.sleep(0.05)
            first, second = servers(folder)
            os.kill(first, signal.SIGKILL)
            assert run.wait(300) == 0, (folder / "said").read_text()
        finally:
            run.kill()
    steps_done = rows(folder / "out" / "metrics.jsonl")
    assert [row["step"] for row in steps_done] == list(range(1, steps + 1))
    assert all(row["staleness/max"] <= 2 for row in steps_done)
    logs = [(folder / "out" / "logs" / f"engine-{i}.log").read_text() for i in range(2)]
    assert sum("is replaced: its server died" in log for log in logs) == 1
    last = [[line for line in log.splitlines() if not line.startswith("weights: ")][-1] for log in logs]
    assert all(line.startswith("joined at ") for line in last), "weights go to both in the end"
    audit = subprocess.run([MILES, "audit", "out"], cwd=folder, capture_output=True, text=True)
    assert audit.returncode == 0 and f"{4 * steps} trained" in audit.stdout, audit.stdout + audit.stderr
    seen = rows(folder / "witness.jsonl")
    assert len(seen) >= 16 * steps and all(len(drawn) == 24 for drawn in seen)
    assert min(token for drawn in seen for token, _ in drawn) >= FIRST, "a server wrote with mixed or stale weights"
    assert any(len({version for _, version in drawn}) > 1 for drawn in seen), "no update met a request in flight"
    assert not servers(folder)
