"""``miles plugins``."""

from __future__ import annotations

import click

from ..plugins import SPECS, PluginError, installed


@click.command()
def command() -> None:
    """List the installed plugins, working or not."""
    for name, found in installed().items():
        try:
            answered = SPECS.keys() & set(dir(found.load()))
            note = " ".join(hook.removeprefix("miles_") for hook in SPECS if hook in answered)
        except PluginError as error:
            note = click.style(f"broken: {error}", fg="red")
        click.echo(f"{name:<10} {found.dist:<20} {found.version:<8} {note}")
