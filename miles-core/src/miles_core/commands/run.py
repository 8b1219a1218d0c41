"""``miles run``."""

from __future__ import annotations

from pathlib import Path

import click

from . import FILES, SET, assembled, run_dir


@click.command()
@FILES
@SET
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the run folder.")
@click.pass_context
def command(context: click.Context, files: tuple[Path, ...], overrides: tuple[str, ...], resume: bool) -> None:
    """Run the training described by FILES; later files win."""
    manifest = assembled(files, overrides)
    context.find_root().obj = folder = run_dir(manifest, files)
    manifest = manifest.at(folder)
    import asyncio

    from ..loop.driver import train  # torch, ray and megatron are imported behind this line and nowhere earlier

    asyncio.run(train(manifest, folder, resume))
