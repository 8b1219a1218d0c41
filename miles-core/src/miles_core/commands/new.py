"""``miles new``."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

import click

from .. import __version__
from ..config import RunConfig
from ..plugins import installed
from ..types import Refused

TEMPLATE = Path(__file__).parents[1] / "testing" / "template"
WRITTEN = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE",
    "run.toml": "run.toml",
    "src/miles_plugin_{name}/__init__.py": "plugin.py",
    "src/miles_plugin_{name}/py.typed": None,
    "tests/test_{name}.py": "test.py",
}


def template(name: str) -> str:
    return (TEMPLATE / f"{name}.tmpl").read_text()


@click.command()
@click.argument("what", type=click.Choice(["plugin"]))
@click.argument("name")
def command(what: str, name: str) -> None:
    """Write a package that holds an algorithm: it installs, passes its own tests, and trains the quickstart's task."""
    folder = Path(f"miles-plugin-{name}")
    title = name.replace("_", " ").title().replace(" ", "")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise Refused(f"{name!r} is no name for a plugin; take lower-case letters, digits and single underscores")
    if name in RunConfig.model_fields or name in installed():
        raise Refused(f"{name!r} is taken, by {installed()[name].dist if name in installed() else 'a table of core'}")
    if title in re.findall(r"\w+", " ".join(re.findall(r"\bimport (.+)", template("plugin.py") + template("test.py")))):
        raise Refused(f"{name!r} is taken: a class {title} would hide the {title} that its own module imports")
    if folder.exists():
        raise Refused(f"{folder} is there already; remove it, or take another name")
    major, minor = __version__.split(".")[:2]
    words = {"name": name, "title": title}
    words |= {"core": f"{major}.{minor}", "next": f"{major}.{int(minor) + 1}"}
    for path, source in WRITTEN.items():
        file = folder / path.format(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template(source) if source else "").substitute(words))
    click.echo(f"{folder} is a package now; its README says how to install, test and run it")
