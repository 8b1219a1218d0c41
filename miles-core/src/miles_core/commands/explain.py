"""``miles explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..edges.toml import Source
from ..edges.toml.assemble import assemble
from . import FILES, SET


@click.command()
@FILES
@SET
def command(files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """List every key of the run, its value, and where it was written."""
    source = Source(files, overrides)
    for key, value in _leaves(assemble(source).tables):
        click.echo(f"{'.'.join(key):<26} {value!s:<28} {source.origin(key)}")


def _leaves(tree: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        found += _leaves(value, (*at, key)) if isinstance(value, dict) and value else [((*at, key), value)]
    return found
