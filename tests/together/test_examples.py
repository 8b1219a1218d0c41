"""What examples/ promises: data written once and the same each time, and run files that Miles accepts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MILES = Path(sys.executable).with_name("miles")
EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def made(example: Path) -> str:
    return subprocess.run(
        [sys.executable, example / "make.py"], check=True, capture_output=True, text=True, timeout=250
    ).stdout


def plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MILES, "plan", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module", params=["reverse", "arithmetic"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of an example with its data written; a model that is shown sums is shown few: nobody asks it for any."""
    folder = tmp_path_factory.mktemp("examples") / str(request.param)
    shutil.copytree(EXAMPLES / str(request.param), folder, ignore=shutil.ignore_patterns("data"))
    text = (folder / "make.py").read_text()
    (folder / "make.py").write_text(sooner := text.replace("WARM_UP_BATCH = 240,", "WARM_UP_BATCH = 4,"))
    assert (sooner != text) == ("WARM_UP" in text)
    assert "held out" in made(folder)
    return folder


def test_data_is_written_once(example: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (example / "data").rglob("*")}
    assert "already there" in made(example)
    assert {path: path.stat().st_mtime_ns for path in (example / "data").rglob("*")} == before


@pytest.mark.parametrize("example", ["reverse"], indirect=True)  # the other one also trains its model
def test_data_cut_short_is_written_again_and_the_same(example: Path) -> None:
    before = {path: path.read_bytes() for path in (example / "data").rglob("*") if path.is_file()}
    (example / "data" / "made-by").unlink()
    (example / "data" / "train.jsonl").write_text("half")
    assert "held out" in made(example)
    assert {path: path.read_bytes() for path in (example / "data").rglob("*") if path.is_file()} == before


def test_what_is_held_out_is_not_trained_on(example: Path) -> None:
    train, held = (
        {json.dumps(json.loads(line)["prompt"]) for line in (example / "data" / name).read_text().splitlines()}
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert len(held) >= 256 and not train & held


def test_the_run_file_is_accepted(example: Path) -> None:
    done = plan(example / "run.toml")
    assert done.returncode == 0, done.stderr
    assert f"runs/{example.name}" in done.stdout


def test_a_plugin_in_one_file_is_laid_over_a_run(example: Path) -> None:
    laid = example / "run.toml", EXAMPLES / "plugin" / "brevity.toml"
    done = plan(*laid)
    assert done.returncode == 0, done.stderr
    assert "brevity.py sha256:" in done.stdout
    refused = plan(*laid, "--set", "brevity.limit=9", "--set", "brevity.wieght=2")
    assert refused.returncode == 2 and "did you mean 'weight'?" in refused.stderr
    refused = plan(*laid, "--set", "brevity.limit=9")
    assert refused.returncode == 2 and "brevity.limit: no response has more than" in refused.stderr
