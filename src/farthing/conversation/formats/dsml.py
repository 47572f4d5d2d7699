"""The calls of V3.2 and V4, written as DSML."""

from __future__ import annotations

import json
from typing import Any

from farthing.conversation.arguments import object_of
from farthing.conversation.parse.dsml import MARK, OPENERS
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import ToolCall, Turn


def syntax(section: str) -> TaggedCalls:
    """The grammar of calls within a section of this name."""
    return TaggedCalls(
        section=Section(f"\n\n<{MARK}{section}>\n", "", f"</{MARK}{section}>"),
        openers=OPENERS,
        begin='invoke name="{name}">',
        string=f'<{MARK}parameter name="{{name}}" string="true">',
        json=f'<{MARK}parameter name="{{name}}" string="false">',
        value_end=f"</{MARK}parameter>",
        end=f"</{MARK}invoke>\n",
        marks=frozenset((MARK,)),
        key='[^"<>\\n]{1,256}',
        others=("tool_calls>\n", "function_calls>\n"),
    )


def write_calls(calls: tuple[ToolCall, ...], section: str) -> str:
    """The section of a turn's calls; empty without any."""
    if not calls:
        return ""
    invokes = "\n".join(
        f'<{MARK}invoke name="{call.name}">\n{_parameters(call)}\n</{MARK}invoke>' for call in calls
    )
    return f"\n\n<{MARK}{section}>\n{invokes}\n</{MARK}{section}>"


def _parameters(call: ToolCall) -> str:
    return "\n".join(
        f'<{MARK}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else to_json(value)}</{MARK}parameter>"
        for key, value in object_of(call.arguments).items()
    )


def to_json(value: Any) -> str:
    """JSON in the style of the models' training data."""
    return json.dumps(value, ensure_ascii=False)


def last_request(turns: list[Turn]) -> int:
    """The position of the last user or developer turn; -1 without one."""
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
