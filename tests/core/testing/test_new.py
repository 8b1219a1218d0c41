"""``miles new plugin``: what it refuses, and that what it writes is a package. ``nox -s new_plugin`` installs one."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from miles_core import __version__
from miles_core.commands.new import WRITTEN
from miles_core.config import ConfigError, RunConfig
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.plugins import single_file
from miles_core.types import Refused
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]


def new(name: str) -> Result:
    from miles_core.commands.new import command

    return CliRunner().invoke(command, ["plugin", name])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def package(folder: Path) -> Path:
    assert new("my_probe").exit_code == 0
    return folder / "miles-plugin-my_probe"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Probe", "lower-case letters"),
        ("my-probe", "lower-case letters"),
        ("2probe", "lower-case letters"),
        ("probe_", "lower-case letters"),  # no name of a distribution ends in one
        ("_probe", "lower-case letters"),
        ("pröbe", "lower-case letters"),
        ("../probe", "lower-case letters"),
        ("lambda", "lower-case letters"),
        ("batch", "taken, by a table of core"),
        ("tracking", "taken, by miles-core"),
        ("loss", "a class Loss would hide"),
        ("plugin", "a class Plugin would hide"),
        ("algorithm_checks", "a class AlgorithmChecks would hide"),
    ],
)
def test_a_name_that_cannot_work_is_refused_and_nothing_written(folder: Path, name: str, why: str) -> None:
    outcome = new(name)
    assert isinstance(outcome.exception, Refused) and why in str(outcome.exception)
    assert not list(folder.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(folder: Path) -> None:
    (folder / "miles-plugin-probe").mkdir()
    outcome = new("probe")
    assert isinstance(outcome.exception, Refused) and "miles-plugin-probe is there already" in str(outcome.exception)
    assert not list((folder / "miles-plugin-probe").iterdir())


def test_the_command_says_so_with_status_2(folder: Path) -> None:
    asked = [Path(sys.executable).with_name("miles"), "new", "plugin", "batch"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2 and "'batch' is taken, by a table of core" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_written_is_a_whole_package(package: Path) -> None:
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == {
        path.format(name="my_probe") for path in WRITTEN
    }
    about = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert about["license"] == "Apache-2.0" and about["license-files"] == ["LICENSE"]
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert about["entry-points"]["miles"] == {"my_probe": "miles_plugin_my_probe:MyProbe"}
    (core,) = [r for r in map(Requirement, about["dependencies"]) if r.name == "miles-core"]
    assert core.specifier.contains(__version__)
    ast.parse((package / "tests/test_my_probe.py").read_text())
    assert not [path for path in package.rglob("*") if path.is_file() and "$" in path.read_text().replace("$ ", "")]


def test_its_plugin_is_one_and_short(package: Path) -> None:
    module = package / "src/miles_plugin_my_probe/__init__.py"
    assert len(module.read_text().splitlines()) < 50
    assert single_file(module).load().__name__ == "MyProbe"


def test_its_run_is_one_and_needs_something_to_compare_with(package: Path, tiny_data: Path) -> None:
    (package / "data").symlink_to(tiny_data)
    file = package / "my_probe.py"  # as a plugin of one file, nothing needs to be installed
    file.write_text((package / "src/miles_plugin_my_probe/__init__.py").read_text())

    def written(*keys: str) -> RunConfig:
        source = Source([package / "run.toml"], [f"algorithm={file}", *keys])
        return RunConfig.model_validate_json(assemble(source).run)

    assert written().batch.group_size > 1
    with pytest.raises(ConfigError, match=r"batch.group_size: one attempt has no other .* at least 2"):
        written("batch.group_size=1")
