"""The ``miles`` command."""

from __future__ import annotations

import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from . import __version__
from .plugins import PluginError
from .types import Refused

COMMANDS = ("audit", "explain", "hooks", "new", "plan", "plugins", "run", "status")  # each imported when it is typed


class Command(click.Group):
    """Every error is one readable cause: status 2 where the input is at fault, 1 where Miles is."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return super().get_command(context, name)
        found: click.Command = import_module(f"miles_core.commands.{name}").command
        return found

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
