"""The JSON schema of calls that a client requires; a grammar built from it forces them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.conversation.types import Conversation, Tool

# For llguidance: at most one blank between two tokens, so that a weak model cannot waste its budget on them.
_MAX_CALLS = 8  # in parallel, for the same reason as above
COMPACT = {"whitespace_pattern": " "}


def schema(conversation: Conversation) -> dict[str, Any] | None:
    """The schema of the whole answer; None if no call is required.

    For a single named function: its arguments. Otherwise a list of calls, {"name": …, "parameters": {…}}.
    """
    choice = conversation.choice
    if choice.mode != "required":
        return None
    tools = [tool for tool in conversation.tools if not choice.names or tool.name in choice.names]
    whole = (
        object_schema(tools[0].parameters)
        if choice.single
        else calls_schema(tools, conversation.parallel_calls)
    )
    return whole | {"x-guidance": COMPACT}


def calls_schema(tools: list[Tool], parallel: bool) -> dict[str, Any]:
    """The schema of one or more calls of the given functions."""
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
        "maxItems": _MAX_CALLS if parallel else 1,
        "$defs": {
            _key(i): rebased(object_schema(tool.parameters), f"#/$defs/{_key(i)}")
            for i, tool in enumerate(tools)
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
