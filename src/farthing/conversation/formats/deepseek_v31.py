"""DeepSeek V3.1: reasoning by the turn's opening tag, bare JSON arguments.

The checkpoint's own template never prints tools; its model card gives the text that describes them.
"""

from __future__ import annotations

import json

from farthing.conversation.base import THINK, ChatFormat, ControlTokens
from farthing.conversation.formats.deepseek_v3 import (
    ASSISTANT,
    OUTPUT_BEGIN,
    OUTPUT_END,
    SECTION,
    USER,
    after_reasoning,
    system_text,
)
from farthing.conversation.formats.deepseek_v3 import STYLE as V3_STYLE
from farthing.conversation.formats.delimited import DEEPSEEK as MARKS
from farthing.conversation.formats.delimited import DelimitedCalls
from farthing.conversation.strict import JsonCalls, Section
from farthing.conversation.types import Conversation, Tool, Turn


def _described(tools: tuple[Tool, ...]) -> str:
    entries = "".join(
        f"\n### {tool.name}\nDescription: {tool.description or ''}\n\n"
        f"Parameters: {json.dumps(tool.parameters or {}, ensure_ascii=False)}\n"
        for tool in tools
    )
    return (
        f"## Tools\nYou have access to the following tools:\n{entries}\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{MARKS.calls_begin}{MARKS.call_begin}tool_call_name{MARKS.separator}tool_call_arguments{MARKS.call_end}"
        f"{{{{additional_tool_calls}}}}{MARKS.calls_end}\n\n"
        "Where:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n"
    )


def _calls(turn: Turn) -> str:
    if not turn.calls:
        return ""
    calls = "".join(
        f"{MARKS.call_begin}{call.name}{MARKS.separator}{call.arguments}{MARKS.call_end}"
        for call in turn.calls
    )
    return f"{MARKS.calls_begin}{calls}{MARKS.calls_end}"


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt. Earlier turns have an empty reasoning; after a tool's output the turn continues."""
    head = [system_text(conversation)] if system_text(conversation) else []
    if conversation.offered:
        head.append(_described(conversation.offered))
    parts = [tokens.bos, "\n\n".join(head)]
    turns = [turn for turn in conversation.turns if turn.role not in ("system", "developer")]
    before = None
    for position, turn in enumerate(turns):
        if turn.role == "user":
            parts += (USER, turn.text)
        elif turn.role == "tool":
            parts += (OUTPUT_BEGIN, turn.text, OUTPUT_END)
        else:
            parts += (
                "" if before == "tool" else ASSISTANT + "</think>",
                after_reasoning(turn.text),
                _calls(turn),
            )
            parts.append("" if conversation.resume and position + 1 == len(turns) else tokens.eos)
        before = turn.role
    if conversation.generate and not conversation.resume and before != "tool":
        parts += (ASSISTANT, "<think>" if V31.thinks(conversation, default=False) else "</think>")
    return "".join(parts)


STYLE = (f"{{name}}{MARKS.separator}", MARKS.call_end)
# A template of DeepSeek's own may teach either way of writing a call, and the parser reads both.
EITHER = JsonCalls((MARKS.call_begin,), (V3_STYLE, STYLE), MARKS.all, SECTION)
V31 = ChatFormat(
    "deepseek_v31",
    render,
    lambda tools, tokens=frozenset(): DelimitedCalls(MARKS, tokens=tokens),
    THINK,
    efforts=("none",),
    markup=MARKS.all,
    syntax=JsonCalls(
        (MARKS.call_begin,), (STYLE,), MARKS.all, Section(MARKS.calls_begin, "", MARKS.calls_end)
    ),
    strips=True,
)
