"""Checks of tools: the JSON schemas of their parameters, their names, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator

from farthing.server.fields import FieldError, one_of, short, words, wrong

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ONE = words(
    "additionalItems additionalProperties contains else if items not propertyNames then",
    "unevaluatedItems unevaluatedProperties",
)
_LISTED = words("allOf anyOf oneOf prefixItems")
_NAMED = words("$defs definitions dependentSchemas patternProperties properties")
_Path = tuple[str | int, ...]


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself. Raises FieldError if it, or a schema within it, cannot be one of arguments."""
    kind = schema.get("type")
    if kind is not None and "object" not in (kind if isinstance(kind, list) else [kind]):
        raise wrong("type", got=kind, expected="'object': arguments are an object")
    _check(schema, ())
    return schema


def _check(schema: Any, path: _Path) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise wrong(*path, got=schema, expected="a schema: an object or a boolean")
    _check_type(schema.get("type"), path)
    required = schema.get("required")
    if required is not None and not _are_names(required):
        raise wrong(*path, "required", got=required, expected="a list of names")
    for key, value in schema.items():
        if value is not None:
            for inner, step in _inner(key, value, path):
                _check(inner, step)


def _check_type(kind: Any, path: _Path) -> None:
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is not None and (not kinds or any(each not in TYPES for each in kinds)):
        raise wrong(*path, "type", got=kind, expected=f"{one_of(TYPES)}, or a list of them")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _inner(key: str, value: Any, path: _Path) -> Iterator[tuple[Any, _Path]]:
    """The schemas that a keyword contains, with their paths."""
    if key in _NAMED:
        if not isinstance(value, dict):
            raise wrong(*path, key, got=value, expected="an object of schemas")
        yield from ((inner, (*path, key, name)) for name, inner in value.items())
    elif key in _LISTED or (key == "items" and isinstance(value, list)):
        if not isinstance(value, list):
            raise wrong(*path, key, got=value, expected="a list of schemas")
        yield from ((inner, (*path, key, at)) for at, inner in enumerate(value))
    elif key in _ONE:
        yield value, (*path, key)


Parameters = Annotated[dict[str, Any], AfterValidator(check_parameters)]


def check_choice(
    names: list[str], chosen: list[str], *, required: bool, tools: str = "tools", choice: str = "tool_choice"
) -> None:
    """Raises FieldError for two tools of one name, and for choices that the tools do not allow.

    tools, choice: the names of the fields.
    """
    seen: set[str] = set()
    for position, name in enumerate(names):
        if name in seen:
            raise FieldError(
                tools, position, problem=f" is another tool named {short(name)}; expected one of each name"
            )
        seen.add(name)
    if required and not names:
        raise FieldError(choice, problem=f" requires a call, but {tools} is empty")
    for name in chosen:
        if name not in seen:
            raise FieldError(choice, problem=f" names {short(name)}, which {tools} does not define")
