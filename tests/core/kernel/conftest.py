from pathlib import Path

import pytest
from miles_core.config import ConfigError
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble

RUN = """\
algorithm = "./mine.py"

[model]
path = "model"

[data]
train = "train.jsonl"
"""

ALGORITHM = """\
from miles_core import Plugin, hookimpl


class Mine(Plugin):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return "loss"
"""


@pytest.fixture
def write(tmp_path):
    """``write(name, text)`` into the folder that ``complaints`` reads; "run.toml" and "mine.py" are there."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    write("run.toml", RUN)
    write("mine.py", ALGORITHM)
    return write


@pytest.fixture
def complaints(tmp_path, write):
    """What is wrong with run.toml: the lines a person would see, the folder's name cut off.

    Only the lines that belong to the kernel: ``data``, ``model`` and their like have tests of their own.
    """

    def complaints(*overrides: str, files: tuple[str, ...] = ("run.toml",)) -> list[str]:
        try:
            assemble(Source([tmp_path / name for name in files], overrides))
        except ConfigError as error:
            return [line.replace(f"{tmp_path}/", "") for line in str(error).splitlines()]
        return []

    return complaints
