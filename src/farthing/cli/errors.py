"""What commands share: errors as one line on stderr, exit codes, and options made from declared fields."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.markup import escape

from farthing.config import Declared, declared, parse_bytes
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


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to `sys.stderr` as it is at the time: above a progress bar while there is one."""

    @property
    def stream(self) -> TextIO:
        """Where records go."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def log_lines() -> None:
    """Log to stderr with time and level."""
    logging.basicConfig(
        level=logging.INFO, handlers=[_Stderr()], format="%(asctime)s %(levelname)s %(message)s"
    )


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
    if not package or package in (
        "farthing",
        "farthing_fleet",
        "farthing_gpu",
        "farthing_lab",
        "farthing_ray",
    ):
        return None
    extra = extra_for(package, command)
    if package == "torch":
        return needs_torch() if extra is None else f"needs PyTorch: {how_to_install(extra, package)}"
    if extra is None:
        return f"{package!r} is not installed: pip install {package}"
    return f"{package!r} is not installed: {how_to_install(extra, package)}"


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
        _fail(_one_line(error), Exit.INPUT, error)
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


# Command-line options generated from configuration dataclasses.

Command = Callable[..., None]


def sampling_option(name: str, says: str, *flags: str) -> Any:
    """The option of a sampling parameter, whose bounds are checked before a model is loaded."""
    from farthing.engine.request import RANGES  # numpy, which other commands do without

    low, high = next((low, high) for field, low, high, _ in RANGES if field == name)
    return typer.Option(*flags, min=low, max=high, help=says)


def with_options(
    *, skip: Collection[str] = (), common: Collection[str] | None = None, **configs: type
) -> Callable[[Command], Command]:
    """Replace each named parameter of a command with the options that a dataclass declares.

    `with_options(engine=EngineConfig)` passes the command `engine`, a dict for `EngineConfig(**engine)`. A
    parameter that the command itself declares takes precedence over a field of the same name. skip: groups to
    omit. common: the parameters that --help shows; the others appear with --help-all.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        generated = {
            name: [d for d in declared(config) if d.name not in own and d.option.group not in skip]
            for name, config in configs.items()
        }
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name in generated:
                parameters += map(_parameter, generated[name])
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        if common is not None:
            for parameter in parameters:
                info = parameter.annotation.__metadata__[0]
                info.hidden = parameter.name not in common
            parameters.append(_HELP_ALL)

        def run(**values: Any) -> None:
            values.pop(_HELP_ALL.name, None)
            for name, options in generated.items():
                values[name] = {d.name: _value(d, values.pop(d.name)) for d in options}
            command(**values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    for parameter in ctx.command.params:
        parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(ctx.get_help())
    raise typer.Exit


_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and exit."),
    ],
)


def _parameter(d: Declared) -> inspect.Parameter:
    kind: Any = Literal[d.choices] if d.choices else d.kind
    if d.repeated:
        kind = list[kind]
    if d.optional or d.repeated:
        kind = kind | None
    text = escape(f"{d.option.help}.")  # brackets such as those of "cpu[/ISA]" are no markup
    if d.option.argument:
        info: Any = typer.Argument(help=text, metavar=d.name.upper())
    else:
        flag = f"--{d.name.replace('_', '-')}"
        negatable = d.kind is bool and d.default is not False
        name = f"{flag}/--no-{flag[2:]}" if negatable else flag
        info = typer.Option(
            name,
            *d.option.flags,
            help=text,
            parser=_size(d.name) if d.option.size else None,
            metavar="BYTES" if d.option.size else None,
            envvar=d.option.environment,
            rich_help_panel=d.option.group,
        )
    return inspect.Parameter(
        d.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if d.repeated else d.default,
        annotation=Annotated[kind, info],
    )


def _size(name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return parse_bytes(name, text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def _value(d: Declared, value: Any) -> Any:
    return tuple(value or ()) if d.repeated else value
