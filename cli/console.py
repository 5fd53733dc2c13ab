"""What every command shares with the person in front of it: the settings option, the console, errors in one line."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from livedraft.contracts import settings
from livedraft.contracts.errors import LivedraftError, SettingsError
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

#: Read when no ``--config`` is given, where it exists.
DEFAULT_CONFIG = Path("configs/laptop.toml")
#: Columns where there is no terminal to ask: wide enough that no table is cut in a file or a pipe.
_PIPE_WIDTH = 200

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="PATH",
        show_default=False,
        help=f"Settings file (TOML). Without it: {DEFAULT_CONFIG} where there is one, else built-in defaults.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]


class LivedraftGroup(TyperGroup):
    """The top command: expected errors end it with one line and a status, 2 for settings, 1 for all else."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "livedraft":
                raise  # our own bug
            _complain(f"{error.name} is not installed; this command needs: pip install 'livedraft[demo]'")
            raise typer.Exit(1) from error
        except BrokenPipeError:  # the reader of our output left; typer ends quietly
            raise
        except (LivedraftError, OSError) as error:  # OSError: a full disk, no permission
            _complain(" ".join(str(error).split()))
            raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from error


def _complain(message: str) -> None:
    Console(stderr=True, highlight=False).print(Text(f"error: {message}", "red"), soft_wrap=True)


def settings_from(path: Path | None, *, target: str = "") -> settings.Settings:
    """The settings of a command.  ``target`` overrides ``engine.target``.  Raises SettingsError."""
    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    loaded = settings.load(path)
    if not target:
        return loaded
    return msgspec.structs.replace(loaded, engine=msgspec.structs.replace(loaded.engine, target=target))


def output() -> Console:
    """Standard output.  Brackets are no markup here: much of what is shown was written by others."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)


def progress_output() -> Console:
    """Where bars and spinners go: standard error, so that standard output can be piped; quiet without a terminal."""
    return Console(stderr=True, quiet=not sys.stderr.isatty())


def print_json(value: Any, *, indent: int = 2) -> None:
    """A value msgspec knows, to standard output; ``indent`` 0 is one line."""
    text = msgspec.json.encode(value)
    sys.stdout.write((msgspec.json.format(text, indent=indent) if indent else text).decode() + "\n")
    sys.stdout.flush()


def clock_time(at: float) -> str:
    """Unix seconds as local date and time; "-" for 0."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "-"


def printable(text: str) -> str:
    """Text of others on one line, unable to steer the terminal."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
