"""``miles hooks``."""

from __future__ import annotations

import inspect

import click

from ..hookspecs import Hooks
from ..plugins import SPECS


@click.command()
@click.argument("name", required=False, type=click.Choice([hook.removeprefix("miles_") for hook in SPECS]))
def command(name: str | None) -> None:
    """Describe every hook, or one."""
    if name:
        spec = SPECS[f"miles_{name}"]
        keyword = "async def" if inspect.iscoroutinefunction(spec) else "def"
        click.echo(f"{keyword} miles_{name}{inspect.signature(getattr(Hooks, 'miles_' + name))}")
        click.echo(f"\n{inspect.getdoc(spec)}\n\n{spec.kind}, called in {' and '.join(spec.places)}")
        return
    for hook, spec in SPECS.items():
        what = (inspect.getdoc(spec) or "").partition("\n")[0]
        click.echo(f"{hook.removeprefix('miles_'):<12} {spec.kind:<6} {spec.places[0]:<8} {what}")
