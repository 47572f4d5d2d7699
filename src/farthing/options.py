"""Options declared once: a dataclass field carries its help, bounds and flags.

`farthing serve --help`, `LLM(**options)` and the checks in `__post_init__` are all derived from the fields:

    max_num_seqs: int = option(64, "Maximum number of sequences per step", group="Engine", minimum=1)

The accepted values of a `Literal` field come from its type. `farthing.cli.options` builds the command line.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KEY = "option"
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", Path: "a Path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Metadata of one field."""

    help: str  # a noun phrase
    group: str  # heading on the command line
    flags: tuple[str, ...] = ()  # short forms besides --field-name
    minimum: float | None = None  # smallest accepted number
    maximum: float | None = None  # largest accepted number
    above: float | None = None  # numbers must exceed this
    argument: bool = False  # a positional argument instead of an option
    environment: str | None = None  # variable with the default
    size: bool = False  # bytes: the command line takes 1.5GB too


@dataclass(frozen=True, slots=True)
class Declared:
    """One option of a dataclass, with its type resolved."""

    name: str
    default: Any
    kind: type  # bool, int, float, str or Path; of the items if `repeated`
    choices: tuple[str, ...]  # of a Literal; empty: any value
    optional: bool  # None is accepted
    repeated: bool  # a tuple of values
    option: Option


def option(
    default: Any,
    help: str,
    *,
    group: str,
    flags: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    argument: bool = False,
    environment: str | None = None,
    size: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option."""
    declared = Option(
        help=help,
        group=group,
        flags=flags,
        minimum=minimum,
        maximum=maximum,
        above=above,
        argument=argument,
        environment=environment,
        size=size,
    )
    return field(default=default, metadata={_KEY: declared})


def inherited(config: type, name: str, *, group: str, **changes: Any) -> Any:
    """An option that another dataclass declares, under this group; `changes`: its default or metadata."""
    (source,) = (f for f in fields(config) if f.name == name)
    default = changes.pop("default", source.default)
    return field(default=default, metadata={_KEY: replace(source.metadata[_KEY], group=group, **changes)})


@lru_cache
def declared(config: Any) -> tuple[Declared, ...]:
    """The options of a dataclass, in order; fields without metadata are left out."""
    hints = get_type_hints(config)
    return tuple(_declared(f, hints[f.name]) for f in fields(config) if _KEY in f.metadata)


def check(config: Any) -> None:
    """Raise ValueError for the first option with a value that its type, choices or bounds exclude."""
    kind: Any = type(config)
    for each in declared(kind):
        value = getattr(config, each.name)
        if value is None and each.optional:
            continue
        values = value if each.repeated and isinstance(value, tuple) else (value,)
        if not all(_accepted(each, v) for v in values):
            raise ValueError(f"{each.name}: got {value!r}; expected {expected(each)}")


def expected(each: Declared) -> str:
    """The accepted values in words, for error messages."""
    if each.choices:
        words = "one of " + ", ".join(each.choices)
    else:
        words = _WORDS[each.kind]
        bounds = {">=": each.option.minimum, ">": each.option.above, "<=": each.option.maximum}
        words += " and".join(f" {sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)
    if each.repeated:
        words = f"a tuple of values, each {words}"
    return words + (", or None" if each.optional else "")


def _accepted(each: Declared, value: Any) -> bool:
    if each.choices:
        return value in each.choices
    kinds: tuple[type, ...] = (int, float) if each.kind is float else (each.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and each.kind is not bool):
        return False
    if isinstance(value, str | Path):
        return True
    assert isinstance(value, int | float)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    low, high, above = each.option.minimum, each.option.maximum, each.option.above
    return (
        (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    )


def _declared(f: Field[Any], hint: Any) -> Declared:
    parts = list(_union(hint))
    optional = type(None) in parts
    (kind,) = (part for part in parts if part is not type(None))
    repeated = get_origin(kind) is tuple
    if repeated:
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    assert f.default is not MISSING, f"option {f.name} has no default"
    return Declared(
        f.name, f.default, str if choices else kind, choices, optional, repeated, f.metadata[_KEY]
    )


def _union(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        yield from get_args(hint)
    else:
        yield hint


def parse_bytes(name: str, value: Any) -> int:
    """1500000, '1.5MB' or '1.5 gib' -> bytes. Raises ValueError naming the field."""
    number, unit = str(value).strip(), ""
    while number and number[-1].isalpha():
        number, unit = number[:-1], number[-1] + unit
    try:
        size = float(number) * _UNITS[unit.upper()]
        if 1 <= size < float("inf"):
            return round(size)
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{name}: got {value!r}; expected bytes such as 1500000, 1.5MB or 1.5GiB")
