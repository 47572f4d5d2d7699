"""User mistakes as one line on stderr: no traceback, a message that says what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from farthing.extras import extra_for

MISTAKES = (OSError, ValueError, RuntimeError)
_TRACEBACK = "FARTHING_TRACEBACK"  # set it to see where an error comes from


@contextmanager
def one_line_errors(command: str = "") -> Iterator[None]:
    """Print a user's mistake as `error: …` and exit with status 2; a missing extra as its pip command.

    command: the subcommand, which decides between extras that bring the same package. With FARTHING_TRACEBACK
    in the environment errors keep their traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):  # control flow, though they are RuntimeErrors
        raise
    except (*MISTAKES, ImportError) as error:
        if os.environ.get(_TRACEBACK) or isinstance(error, BrokenPipeError):
            raise
        message = _missing(error, command) if isinstance(error, ImportError) else _one_line(error)
        if message is None:
            raise
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from error


def exit_on_error(command: str) -> None:
    """Handle the exception in flight as `one_line_errors` does, outside of any click command."""
    try:
        with one_line_errors(command):
            raise
    except typer.Exit as stop:
        sys.exit(stop.exit_code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    message = " ".join(str(error).split()) or type(error).__name__
    return f"{message} ({_TRACEBACK}=1 shows where)" if type(error) is RuntimeError else message


def _missing(error: ImportError, command: str) -> str | None:
    """The pip command for a module that an extra of ours provides; None: the error is our own."""
    package = (error.name or "").partition(".")[0]
    if not package or package == "farthing":
        return None
    extra = extra_for(package, command)
    if extra is None:
        return f"the Python package {package!r} is not installed; pip install {package}"
    return f"{package!r} is not installed; pip install 'farthing[{extra}]'"
