"""Converts parameter values from text to JSON. The tool's schema decides if the text is ambiguous."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Kinds = frozenset[str] | None  # JSON types a schema accepts; None: not known

_MAX_DEPTH = 8  # of references and unions in a schema
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def kinds_of(parameters: Mapping[str, Any] | None, name: str) -> Kinds:
    """The JSON types that a function's schema accepts for a parameter."""
    properties = (parameters or {}).get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return _kinds(schema, parameters or {}, _MAX_DEPTH)


def _kinds(schema: Any, root: Mapping[str, Any], depth: int) -> Kinds:
    if not isinstance(schema, Mapping) or not depth:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return _kinds(resolved(root, reference), root, depth - 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str)) or None
    if "const" in schema:
        return frozenset({_kind(schema["const"])})
    if isinstance(values := schema.get("enum"), list) and values:
        return frozenset(map(_kind, values))
    for union in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(union), list) and branches:
            found = [_kinds(branch, root, depth - 1) for branch in branches]
            return None if None in found else frozenset().union(*(kinds for kinds in found if kinds))
    if isinstance(parts := schema.get("allOf"), list):
        return next((kinds for part in parts if (kinds := _kinds(part, root, depth - 1))), None)
    return None


def resolved(root: Mapping[str, Any], reference: str) -> Any:
    """What a reference within a schema refers to; None if there is no such part."""
    if not reference.startswith("#"):
        return None
    node: Any = root
    for step in reference[1:].split("/")[1:]:
        node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def is_text(declared: bool | None, kinds: Kinds) -> bool:
    """Whether a value is a string whatever it contains, so that it can be streamed as it arrives.

    declared: what the format says (True: a string, False: JSON); None: it says nothing.
    """
    if declared:
        return kinds is None or "string" in kinds
    return declared is None and kinds == frozenset({"string"})


def to_json(text: str, declared: bool | None, kinds: Kinds) -> str:
    """A complete value as JSON text."""
    if is_text(declared, kinds):
        return quoted(text)
    value = _json(text)
    if value is None:
        return quoted(text)
    kind = _kind(json.loads(value))
    fits = kinds is None or kind in kinds or (kind == "integer" and "number" in kinds)
    if fits:
        return value
    if kind == "number" and kinds is not None and "integer" in kinds and float(value).is_integer():
        return str(int(float(value)))
    if declared or (kinds is not None and "string" in kinds):
        return quoted(text)
    return value


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _json(text: str) -> str | None:
    """The JSON text of a value, or None if it is not JSON. Python's True, False and None are understood."""
    text = text.strip()
    text = _PYTHON.get(text, text)
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return text


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
