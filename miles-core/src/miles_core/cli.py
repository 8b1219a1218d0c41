"""The ``miles`` command."""

from __future__ import annotations

import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .config import RunConfig
from .plugins import Manifest, PluginError, assemble
from .types import Refused

if TYPE_CHECKING:
    from .edges.toml import Source

FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key; TOML values.")


MORE = {name: f"miles_core.edges.commands.{name}" for name in "audit explain hooks new plan plugins status".split()}


class Command(click.Group):
    """Every error is one readable cause: status 2 where the input is at fault, 1 where Miles is."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *MORE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in MORE:
            found: click.Command = import_module(MORE[name]).command
            return found
        return super().get_command(context, name)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except Refused as error:
            _stop(error, 2, context.obj if isinstance(error, PluginError) else None)
        except OSError as error:  # a full disk, a folder that cannot be written
            _stop(error, 2 if error.filename or error.errno else 1)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            _stop(error, 1, context.obj)


def _stop(error: BaseException, status: int, folder: Path | None = None) -> None:
    text = str(error) if isinstance(error, Refused | OSError) else f"{type(error).__name__}: {error}"
    for line in (*text.splitlines(), *(n for n in getattr(error, "__notes__", ()) if "\n" not in n)):
        click.echo(f"Error: {line}", err=True)
    if folder and folder.is_dir():
        (folder / "error.log").write_text("".join(traceback.format_exception(error)))
        click.echo(f"The whole story is in {folder / 'error.log'}", err=True)
    raise SystemExit(status)


@click.group(cls=Command)
@click.version_option(__version__)
def main() -> None:
    """Train a language model with reinforcement learning, one plugin at a time."""


@main.command()
@FILES
@SET
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the run folder.")
@click.pass_context
def run(context: click.Context, files: tuple[Path, ...], overrides: tuple[str, ...], resume: bool) -> None:
    """Run the training described by FILES; later files win."""
    manifest = assemble(written(files, overrides))
    context.find_root().obj = folder = run_dir(manifest, files)
    manifest = manifest.at(folder)
    import asyncio

    from .loop.driver import train  # torch, ray and megatron are imported behind this line and nowhere earlier

    asyncio.run(train(manifest, folder, resume))


def written(files: tuple[Path, ...], overrides: tuple[str, ...]) -> Source:
    """The run as FILES and --set describe it."""
    from .edges.toml import Source

    return Source(files, overrides)


def run_dir(manifest: Manifest, files: tuple[Path, ...]) -> Path:
    """``run_dir``, or runs/NAME for NAME.toml, or for NAME/run.toml."""
    run = RunConfig.model_validate_json(manifest.run)
    name = files[0].stem if files[0].stem != "run" else files[0].absolute().parent.name
    return run.run_dir or Path("runs") / name
