"""Builds dataclasses from the plain values of a configuration file.

Declared types decide: numbers, strings, paths, literals, nested dataclasses, mappings, lists as tuples, and
mappings as tuples of pairs. Errors name the field, its value and what is accepted.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_WORDS |= {Path: "a path", dict: "a mapping", tuple: "a list"}


def read(cls: type[T], data: Any, where: str = "", base: T | None = None) -> T:
    """Build a dataclass from a (nested) mapping. Raises ValueError with the invalid field.

    where: the field that holds the mapping, for errors. base: an instance with the defaults.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or 'configuration'}: got {data!r}; expected a mapping of fields")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ValueError(f"{_join(where, str(name))}: unknown field; expected one of {', '.join(known)}")
    values = {name: _convert(hints[name], value, _join(where, name)) for name, value in data.items()}
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    try:
        return cls(**values)
    except TypeError as problem:  # a required field is missing
        raise ValueError(f"{where or 'configuration'}: {str(problem).split(') ')[-1]}") from problem


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert `value` to the declared type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where)
    if origin is tuple and isinstance(value, list | Mapping):
        return _items(arguments[0], value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    fits = isinstance(plain, type) and isinstance(value, plain)
    if fits and not (plain is int and isinstance(value, bool)):
        return value
    choices = f"one of {', '.join(map(repr, arguments))}"
    accepted = choices if origin is typing.Literal else _WORDS.get(plain, str(plain))
    raise ValueError(f"{where}: got {value!r}; expected {accepted}")


def _items(kind: Any, value: list[Any] | Mapping[Any, Any], where: str) -> tuple[Any, ...]:
    """The items of a list, or the pairs of a mapping if pairs are declared."""
    if isinstance(value, list):
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, item in enumerate(value))
    pair = typing.get_args(kind)
    if typing.get_origin(kind) is not tuple or len(pair) != 2:
        raise ValueError(f"{where}: got {value!r}; expected a list")
    return tuple(
        (_convert(pair[0], key, where), _convert(pair[1], item, f"{where}[{key!r}]"))
        for key, item in value.items()
    )
