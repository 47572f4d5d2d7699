"""The JSON schema of calls that a client requires, for models whose format of calls is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.conversation.closed import closed
from farthing.conversation.types import Conversation, Tool

# For llguidance: at most one blank between two tokens, so that a weak model cannot waste its budget on them.
COMPACT = {"whitespace_pattern": " "}
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
    names = conversation.choice.names
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
