"""Exit codes of the commands that evaluate or write models, and one-line errors on stderr."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    DEFECT = 1  # an unexpected error, with a traceback: Python's own code
    INPUT = 2  # an invalid file or option; the message names it
    UNDECIDED = 3  # the held-out text is too short to decide
    WORSE = 4  # the model is worse than the bound allows
    STORAGE = 5  # a file could not be read or written; some commands resume, see `errors_as_one_line`
    MISFIT = 6  # `plan`: the largest rank exceeds the memory


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def errors_as_one_line(then: str | None = None) -> Iterator[None]:
    """Print errors a user can fix as one line and exit with their code; bugs keep their traceback.

    then: what to do once there is space again, such as "run the same command to resume".
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error), Exit.INPUT, error)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in _FULL:
            said += "; free some space" + (f", then {then}" if then else "")
        _fail(said, Exit.STORAGE, error)


def _fail(message: str, code: Exit, error: Exception) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from error


def exit_on_verdict(answer: str, said: str | None = None) -> None:
    """Exit with the code of a verdict other than "pass", printing its sentence on stderr."""
    if answer == "pass":
        return
    if said is not None:
        typer.echo(said, err=True)
    raise typer.Exit(Exit.WORSE if answer == "fail" else Exit.UNDECIDED)
