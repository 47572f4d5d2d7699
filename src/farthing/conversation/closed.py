"""Closes the schemas of forced arguments, so that a weak model does not spend its tokens on undeclared ones.

JSON Schema allows undeclared members and numbers of any length unless it says otherwise. In a closed schema
an object with declared members has no others, unless the schema allows them explicitly; an object of free
members has a limited number of them, and integers have at most 19 digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MOST_MEMBERS = 16  # that are not declared
_MOST = 9 * 10**18  # llguidance's ranges have 64 bits
# What applies to the same value as the members next to it: closing one part would exclude those of another.
_TOGETHER = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "$ref"}
_TOGETHER |= {"unevaluatedProperties", "patternProperties", "propertyNames"}


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The closed form of a schema that is valid; parts that are not are left as they are."""
    result: dict[str, Any] = _closed(schema, shared=not any(map(_mixed, _nodes(schema))))
    return result


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for part in value.values():
            yield from _nodes(part)
    elif isinstance(value, list):
        for part in value:
            yield from _nodes(part)


def _mixed(node: Mapping[str, Any]) -> bool:
    """Whether several parts describe one value, so that a shared definition may be one of them."""
    together = _TOGETHER & set(node)
    several = isinstance(parts := node.get("allOf"), list) and len(parts) > 1
    return (
        several
        or bool({"not", "if", "dependentSchemas"} & together)
        or ("properties" in node and bool(together))
    )


def _closed(node: Any, shared: bool) -> Any:
    """shared: close the definitions as well."""
    if not isinstance(node, Mapping):
        return node
    result = dict(node)
    for key in ("properties", *(("$defs", "definitions") if shared else ())):
        if isinstance(parts := node.get(key), Mapping):
            result[key] = {name: _closed(part, shared) for name, part in parts.items()}
    for key in ("items", "additionalProperties"):
        if key in node:
            result[key] = _closed(node[key], shared)
    if not _mixed(node):
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := node.get(key), list):
                result[key] = [_closed(part, shared) for part in parts]
    if not _TOGETHER & set(node):
        result |= _members(node) | _integer(node)
    return result


def _members(node: Mapping[str, Any]) -> dict[str, Any]:
    """What limits an object's undeclared members."""
    kinds, properties, required = node.get("type"), node.get("properties", {}), node.get("required", [])
    if kinds not in ("object", ["object", "null"], None) or not isinstance(properties, Mapping):
        return {}
    if kinds is None and "properties" not in node:
        return {}
    if not isinstance(required, list) or any(name not in list(properties) for name in required):
        return {}  # to be refused by the grammar, or a required member that is not declared
    if "properties" in node and "additionalProperties" not in node:
        return {"additionalProperties": False}
    bounded = node.get("additionalProperties") is False or "maxProperties" in node
    # llguidance counts members only if all declared ones are required.
    if bounded or len(required) < len(properties):
        return {}
    least = node.get("minProperties", 0)
    return {"maxProperties": MOST_MEMBERS + max(len(properties), least if isinstance(least, int) else 0)}


def _integer(node: Mapping[str, Any]) -> dict[str, Any]:
    if node.get("type") != "integer" or {"enum", "const", "multipleOf", "format"} & set(node):
        return {}
    limits: dict[str, Any] = {}
    for key, limit in (("minimum", -_MOST), ("maximum", _MOST)):
        own = next((node[name] for name in (key, f"exclusive{key.capitalize()}") if name in node), None)
        if own is None:
            limits[key] = limit
        elif not isinstance(own, int | float) or abs(own) >= _MOST:
            return {}
    return limits
