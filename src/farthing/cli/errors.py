"""User errors as one line on stderr, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from farthing.extras import extra_for, how_to_install, needs_torch

MISTAKES = (OSError, ValueError, RuntimeError)
_TRACEBACK = "FARTHING_TRACEBACK"  # set this to see tracebacks


@contextmanager
def one_line_errors(command: str = "") -> Iterator[None]:
    """Print a user error as `error: …` and exit with status 2; for a missing extra, print its pip command.

    command: the subcommand, which decides between extras that provide the same package. With
    FARTHING_TRACEBACK in the environment, errors keep their traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):  # control flow, though subclasses of RuntimeError
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
    """Handle the current exception like `one_line_errors`, outside any click command."""
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
    return f"{message} (set {_TRACEBACK}=1 for the traceback)" if type(error) is RuntimeError else message


def _missing(error: ImportError, command: str) -> str | None:
    """The pip command for a missing module; None if the module is our own."""
    package = (error.name or "").partition(".")[0]
    if not package or package == "farthing":
        return None
    extra = extra_for(package, command)
    if package == "torch":
        return needs_torch() if extra is None else f"needs PyTorch: {how_to_install(extra)}"
    if extra is None:
        return f"the Python package {package!r} is not installed; pip install {package}"
    return f"{package!r} is not installed; {how_to_install(extra)}"
