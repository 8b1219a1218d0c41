"""What the ``miles`` command can do: a module a command, imported when it is typed."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import RunConfig
from ..plugins import Manifest

FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key; TOML values.")


def assembled(files: tuple[Path, ...], overrides: tuple[str, ...]) -> Manifest:
    """The run that FILES and --set describe. Raises ConfigError with all that is wrong with it."""
    from ..edges.toml import Source
    from ..edges.toml.assemble import assemble

    return assemble(Source(files, overrides))


def run_dir(manifest: Manifest, files: tuple[Path, ...]) -> Path:
    """``run_dir``, or runs/NAME for NAME.toml, or for NAME/run.toml."""
    run = RunConfig.model_validate_json(manifest.run)
    name = files[0].stem if files[0].stem != "run" else files[0].absolute().parent.name
    return run.run_dir or Path("runs") / name
