"""Calls that a client requires, as one JSON schema, closed so that a weak model declares nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from farthing.conversation.types import Conversation, Tool

# Closes the schemas of forced arguments, so that a weak model does not spend its tokens on undeclared ones.
#
# JSON Schema allows undeclared members and numbers of any length unless it says otherwise. In a closed
# schema an object with declared members has no others, unless the schema allows them explicitly; an
# object of free members has a limited number of them, and integers have at most 19 digits.

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
    if not isinstance(required, list) or not all(declared(name, properties) for name in required):
        return {}  # to be refused by the grammar, or a required member that is not declared
    if "properties" in node and "additionalProperties" not in node:
        return {"additionalProperties": False}
    bounded = node.get("additionalProperties") is False or "maxProperties" in node
    # llguidance counts members only if all declared ones are required.
    if bounded or len(required) < len(properties):
        return {}
    least = node.get("minProperties", 0)
    return {"maxProperties": MOST_MEMBERS + max(len(properties), least if isinstance(least, int) else 0)}


def declared(name: Any, properties: Mapping[str, Any]) -> bool:
    """Whether an entry of `required` is the name of one of the properties."""
    return isinstance(name, str) and name in properties


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


# For llguidance: blanks only where templates print them. A weak model cannot waste its budget on more, and
# the next prompt has a call's text as it was sampled, also if the client sends the arguments as an object.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_CALLS = 8  # in parallel, for the same reason
_TOKENS = 100  # of the answer's limit for each further call: models that repeat themselves still finish


def schema(conversation: Conversation, room: int | None = None) -> dict[str, Any] | None:
    """The schema of the whole answer, of at most `room` tokens; None if no call is required.

    For a single named function: its arguments. Otherwise a list of calls, {"name": …, "parameters": {…}}.
    """
    if conversation.choice.mode != "required":
        return None
    tools = eligible(conversation)
    whole = (
        arguments_schema(tools[0])
        if conversation.choice.single
        else calls_schema(tools, most_calls(conversation, room))
    )
    return whole | {"x-guidance": COMPACT}


def eligible(conversation: Conversation) -> list[Tool]:
    """The tools of which one must be called."""
    names = set(conversation.choice.names)
    return [tool for tool in conversation.tools if not names or tool.name in names]


def most_calls(conversation: Conversation, room: int | None = None) -> int:
    """The maximum number of forced calls in an answer of at most `room` tokens."""
    if not conversation.parallel_calls or conversation.choice.single:
        return 1
    return _MAX_CALLS if room is None else min(_MAX_CALLS, max(1, room // _TOKENS))


def calls_schema(tools: list[Tool], most: int) -> dict[str, Any]:
    """The schema of one to `most` calls of the given functions."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{_key(i)}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "maxItems": most,
        "$defs": {
            _key(i): rebased(arguments_schema(tool), f"#/$defs/{_key(i)}") for i, tool in enumerate(tools)
        },
    }


def _key(position: int) -> str:
    """A definition's name. The tool's own name may contain characters that are special in a reference."""
    return f"tool{position}"


def object_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function's parameters as an object schema; an empty object if there are none.

    Arguments are always an object, even if the schema says otherwise: a call could not be parsed back.
    """
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return dict(parameters) | {"type": "object"}


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a forced call's arguments."""
    return closed(object_schema(tool.parameters))


def rebased(schema: Any, root: str) -> Any:
    """A schema whose references to its own root still resolve after it is moved."""
    if isinstance(schema, list):
        return [rebased(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else rebased(value, root)
        for key, value in schema.items()
    }
