"""Whether work grows in proportion to its input: bodies derived from pydantic's classes, and their cost.

A body is made for every field that is a string, an array or a map, wherever it is, so that a new field is
tested on the day it is declared.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

MOST_RATIO = 2.5  # of the cost of twice as much
_NOTICED = 0.01  # seconds; a cost below it is not worth a ratio
_TRIES = 5
_FILL = 100  # characters of a text that does not grow
_DEPTH = 6  # of fields within fields

# Texts that are hard for regular expressions, parsers and templates when they are repeated.
HARD = ("a", "1", " ", "\n", '\\"', '"', "\\", "{", "<", "<think>", "\ud7ff", "a.", "-", "/", "\\ud800")


# Cost.


def cost(work: Callable[[], object]) -> float:
    """CPU seconds of the calling thread, without collections of garbage."""
    gc.disable()
    began = time.thread_time()
    try:
        work()
        return time.thread_time() - began
    finally:
        gc.enable()


def excess(work: Callable[[int], object], size: int, noticed: float = _NOTICED) -> str | None:
    """What is wrong with work whose cost grows faster than its size, over two doublings; None if it does not.

    The least of several tries counts: a machine that does something else makes single figures too high.
    """
    small = large = math.inf
    for _ in range(_TRIES):
        large = min(large, cost(lambda: work(4 * size)))
        if large < noticed:
            return None
        small = min(small, cost(lambda: work(size)))
        if large / small < MOST_RATIO**2:
            return None
    return f"{size}: {small * 1e3:.1f} ms, {4 * size}: {large * 1e3:.1f} ms"


# Bodies.


@dataclass(frozen=True)
class Grown:
    """A field, and the body in which it has a size."""

    path: str
    kind: str  # string, array or object
    make: Callable[[int, str], Any]  # (size, text of which strings consist) -> the body


def grown(model: type[BaseModel], base: Mapping[str, Any], complete: Mapping[str, Any]) -> Iterator[Grown]:
    """All fields of a class of bodies. base: a valid body. complete: by class, fields that its validators
    want besides those that are required."""
    schema = model.model_json_schema(mode="validation")
    maker = _Maker(schema.get("$defs", {}), complete)
    for name, part in schema["properties"].items():
        for path, kind, make in maker.fields(part, name, _DEPTH):
            yield Grown(path, kind, _within(base, name, make))


def _within(base: Mapping[str, Any], name: str, make: _Make) -> Callable[[int, str], Any]:
    return lambda size, text: {**base, name: make(size, text)}


_Make = Callable[[int, str], Any]
_Field = tuple[str, str, _Make]


class _Maker:
    """Values of JSON schemas, as pydantic writes them."""

    def __init__(self, definitions: Mapping[str, Any], complete: Mapping[str, Any]) -> None:
        self._definitions, self._complete = definitions, complete

    def fields(self, schema: Any, path: str, depth: int) -> Iterator[_Field]:
        """What can grow in a value, at any depth."""
        if not depth:
            return
        for name, kind in self._variants(schema):
            where = f"{path}<{name}>" if name else path
            if kind.get("type") == "string" and "enum" not in kind and "const" not in kind:
                yield where, "string", lambda size, text: _text(size, text)
            elif kind.get("type") == "array":
                items = kind.get("items", {})
                item = self.least(items)
                yield (
                    where,
                    "array",
                    lambda size, text, item=item: [_numbered(item, at) for at in range(size)],
                )
                for inner, which, make in self.fields(items, f"{where}[]", depth - 1):
                    yield inner, which, lambda size, text, make=make: [make(size, text)]
            elif kind.get("type") == "object" and "properties" not in kind:
                yield where, "object", lambda size, text: {f"{number}": number for number in range(size)}
                yield f"{where}.*", "string", lambda size, text: {"1": _text(size, text)}
                yield f"{where}.*", "array", lambda size, text: {"1": [{"a": "b"}] * size}
                yield f"{where} (deep)", "object", lambda size, text: chained(size)
            else:
                yield from self._members(name, kind, where, depth)

    def _members(self, name: str, kind: Any, where: str, depth: int) -> Iterator[_Field]:
        least = self.least(kind)
        for member, part in kind.get("properties", {}).items():
            for path, which, make in self.fields(part, f"{where}.{member}", depth - 1):
                yield (
                    path,
                    which,
                    lambda size, text, make=make, member=member: (
                        least | self._wanted(name) | {member: make(size, text)}
                    ),
                )

    def least(self, schema: Any) -> Any:
        """The smallest valid value."""
        name, kind = next(self._variants(schema), ("", {}))
        if "const" in kind or "enum" in kind:
            return kind.get("const", kind.get("enum", [None])[0])
        match kind.get("type"):
            case "string":
                return "#" + "a" * (min(_FILL, kind.get("maxLength", _FILL)) - 1)
            case "array":
                return [self.least(kind.get("items", {}))] * kind.get("minItems", 0)
            case "integer" | "number":
                return max(kind.get("minimum", 1), 1)
            case "boolean":
                return False
            case "null":
                return None
            case _:
                required = {each: self.least(kind["properties"][each]) for each in kind.get("required", ())}
                return required | self._wanted(name)

    def _wanted(self, name: str) -> dict[str, Any]:
        return dict(self._complete.get(name, {}))

    def _variants(self, schema: Any) -> Iterator[tuple[str, Any]]:
        """The kinds of value that a schema allows, each with the name of its class."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            definition = self._definitions[name]
            if "properties" in definition:
                yield from ((name, each) for each in _by_type(definition))
            else:
                yield from self._variants(definition)
            return
        unions = [part for union in ("anyOf", "oneOf") for part in schema.get(union, ())]
        for part in unions:
            yield from self._variants(part)
        if not unions and schema.get("type") != "null":
            yield "", schema


def _by_type(definition: Any) -> Iterator[Any]:
    """A class of which each type has other fields, once for each."""
    kinds = definition["properties"].get("type", {})
    for kind in kinds.get("enum", ()):
        properties = definition["properties"] | {"type": {"const": kind}}
        required = {*definition.get("required", ()), "type"}
        yield definition | {"properties": properties, "required": sorted(required)}
    if "enum" not in kinds:
        yield definition


def _numbered(value: Any, number: int) -> Any:
    """A value whose texts are its own: `#` stands for the number of the item."""
    if isinstance(value, str):
        return value.replace("#", f"{number}")
    if isinstance(value, dict):
        return {name: _numbered(each, number) for name, each in value.items()}
    return [_numbered(each, number) for each in value] if isinstance(value, list) else value


def _text(size: int, text: str) -> str:
    return (text * (size // len(text) + 1))[: size - 1] + "!"  # so that a repetition does not end the text


def chained(size: int) -> dict[str, Any]:
    """A schema of references, each to the next."""
    names = {f"p{number}": {"$ref": f"#/$defs/p{number + 1}"} for number in range(size)}
    return {
        "type": "object",
        "properties": names,
        "required": list(names),
        "$defs": names | {f"p{size}": {"type": "string"}},
    }
