"""``miles plan``."""

from __future__ import annotations

from pathlib import Path

import click

from . import FILES, SET, assembled, run_dir


@click.command()
@FILES
@SET
def command(files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check everything that FILES ask for, say what a run would take, start nothing."""
    manifest = assembled(files, overrides)
    registry = manifest.registry("driver")
    click.echo(f"run folder   {run_dir(manifest, files)}")
    click.echo("plugins      " + ", ".join(f"{name} ({of})" for name, of in manifest.versions.items()))
    click.echo("\nwho answers each slot")
    for hook, owner in registry.owner.items():
        click.echo(f"  {hook.removeprefix('miles_'):<12} {owner}")
    for what, text in registry.explain(roles=registry.roles()).items():
        click.echo(f"\n{what}\n  " + text.replace("\n", "\n  "))
