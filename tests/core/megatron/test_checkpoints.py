"""A checkpoint that is written behind training: killed in its midst, or without room, it does not count."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layouts import MODELS, case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behind")
    torch.manual_seed(0)
    torch.save({"qwen3": case(folder / "qwen3", *MODELS["qwen3"])}, folder / "cases.pt")
    return folder


def ranks(what: str, folder: Path) -> tuple[list[int], str]:
    script, tests = Path(__file__).with_name("checkpoints.py"), Path(__file__).parents[2]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, script, what, str(rank), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    return [rank.returncode for rank in started], "\n".join(said)


@pytest.mark.slow
def test_a_rank_killed_in_the_midst_of_writing_leaves_the_checkpoint_before(folder: Path) -> None:
    codes, said = ranks("die", folder)
    assert codes == [0, -signal.SIGXFSZ], said
    codes, said = ranks("resume", folder)
    assert codes == [0, 0], said


@pytest.mark.slow
def test_a_full_disk_is_told_with_its_path_on_every_rank(folder: Path) -> None:
    codes, said = ranks("full", folder)
    assert codes == [0, 0], said
