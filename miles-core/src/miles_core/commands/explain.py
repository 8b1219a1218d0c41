"""``miles explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from ..edges.toml import Source
from ..edges.toml.assemble import assemble
from . import FILES, SET


@click.command()
@FILES
@SET
def command(files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """List every key of the run, its value, and where it was written."""
    source = Source(files, overrides)
    manifest = assemble(source)
    plain = {found.name: _defaults(found.load().Config) for found, _ in manifest.plugins}
    for key, value in _leaves(manifest.tables):
        origin, table = source.origin(key), plain.get(key[0], {})
        if origin == "default" and len(key) == 2 and key[1] in table and table[key[1]] != value:
            origin = f"follows from another key of [{key[0]}]"
        click.echo(f"{'.'.join(key):<26} {value!s:<28} {origin}")


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """What each key of a table is where nothing at all is written, as it stands in the run's tables."""
    fields = {
        name: field for name, field in model.model_fields.items() if not field.default_factory_takes_validated_data
    }
    plain = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: to_jsonable_python(value) for name, value in plain.items() if value is not PydanticUndefined}


def _leaves(tree: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        found += _leaves(value, (*at, key)) if isinstance(value, dict) and value else [((*at, key), value)]
    return found
