"""Command-line options generated from configuration dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from farthing.options import Declared, declared, parse_bytes

Command = Callable[..., None]


def with_options(*, skip: Collection[str] = (), **configs: type) -> Callable[[Command], Command]:
    """Replace each named parameter of a command with the options that a dataclass declares.

    `with_options(engine=EngineConfig)` passes the command `engine`, a dict for `EngineConfig(**engine)`. A
    parameter that the command itself declares takes precedence over a field of the same name. skip: groups to
    omit.
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

        def run(**values: Any) -> None:
            for name, options in generated.items():
                values[name] = {d.name: _value(d, values.pop(d.name)) for d in options}
            command(**values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


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
