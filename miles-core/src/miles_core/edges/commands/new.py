"""``miles new``."""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """Write a package."""
