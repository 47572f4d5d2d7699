"""Files written atomically, and configuration files read into dataclasses.

A failed write raises OSError with the target's name and leaves the target unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


def json_size(document: Any, per_value: int = 1) -> int:
    """Characters of all strings in a document, keys included, plus `per_value` for each value."""
    size, stack = 0, [document]
    while stack:
        item = stack.pop()
        size += per_value
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += sum(len(str(key)) for key in item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return size


class BeingWritten(ValueError):
    """Another process is writing the same file."""


_OS_ERROR = re.compile(r"os error (\d+)")


def replace(target: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Let `write` fill a temporary file, then rename it to `target`. Raises OSError.

    durable=False skips the fsync, for state that is rewritten every few seconds.
    """
    partial = partial_of(target)
    try:
        write(partial)
        partial.chmod(_file_mode())  # safetensors creates files readable only by their owner
        if durable:
            _sync(partial)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    except SafetensorError as error:
        match = _OS_ERROR.search(str(error))
        if match is None:
            raise
        number = int(match.group(1))
        raise OSError(number, os.strerror(number), str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """This process's temporary file for `target`; other processes use other names."""
    return target.with_name(f"{target.name}.{os.getpid()}.tmp")


def replace_text(target: Path, text: str, durable: bool = True) -> None:
    """Write UTF-8 text."""
    replace(target, lambda file: _write(file, text), durable)


def replace_json(target: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON with a final newline."""
    replace_text(target, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Valid JSON of plain values; NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def replace_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors must be contiguous and share no memory."""
    from safetensors.torch import save_file

    replace(target, lambda file: save_file(dict(tensors), str(file), metadata={"format": "pt"}))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _file_mode() -> int:
    """Read and write permissions for everyone, as far as the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


T = TypeVar("T")

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_WORDS |= {Path: "a path", dict: "a mapping", tuple: "a list"}


def read(cls: type[T], data: Any, where: str = "", base: T | None = None) -> T:
    """Build a dataclass from a (nested) mapping. Raises ValueError with the invalid field.

    where: the field that holds the mapping, for errors. base: an instance with the defaults, also of the
    dataclasses inside it.

    Declared types decide: numbers, strings, paths, literals, nested dataclasses, mappings, lists as tuples,
    and mappings as tuples of pairs. Errors name the field, its value and what is accepted.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or 'configuration'}: got {data!r}; expected a mapping of fields")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for name in data:
        if name not in names:
            raise ValueError(f"{_join(where, str(name))}: unknown field; expected one of {', '.join(names)}")
    values = {
        name: _convert(hints[name], value, _join(where, name), getattr(base, name, None))
        for name, value in data.items()
    }
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    try:
        return cls(**values)
    except TypeError as problem:  # a required field is missing
        raise ValueError(f"{where or 'configuration'}: {str(problem).split(') ')[-1]}") from problem


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str, base: Any = None) -> Any:
    """Convert `value` to the declared type of a field. base: an instance with the defaults of a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, base)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where, base if isinstance(base, hint) else None)
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
