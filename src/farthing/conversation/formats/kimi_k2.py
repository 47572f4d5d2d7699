"""Kimi K2 Instruct, K2 Thinking and K2.5: turns between `<|im_…|>` tokens, call ids functions.NAME:INDEX.

Instruct does not reason. Thinking opens reasoning in front of every answer itself, K2.5's prompt opens it;
both have an empty one in earlier turns.
"""

from __future__ import annotations

import json
from dataclasses import replace

from farthing.conversation.base import THINK, ChatFormat, ControlTokens
from farthing.conversation.formats.delimited import KIMI as MARKS
from farthing.conversation.formats.delimited import DelimitedCalls
from farthing.conversation.scan import plain
from farthing.conversation.strict import JsonCalls, Section
from farthing.conversation.types import Conversation, Tool, ToolCall, Turn

_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
_END = "<|im_end|>"


def _head(role: str, name: str) -> str:
    return f"<|im_{role}|>{name}<|im_middle|>"


def _declared(tools: tuple[Tool, ...]) -> str:
    documents = [{"type": "function", "function": tool.document()} for tool in tools]
    text = json.dumps(documents, ensure_ascii=False, separators=(",", ":"))
    return f"{_head('system', 'tool_declare')}{text}{_END}"


class _Ids:
    """Calls' ids as the model writes them. Ids of other servers do not hold the function's name."""

    def __init__(self) -> None:
        self._number = 0
        self._native: dict[str, str] = {}

    def of_call(self, call: ToolCall) -> str:
        """The id of the next call."""
        stem, _, index = call.id.rpartition(":")
        own = plain(stem) == f"functions.{plain(call.name)}" and index.isdigit()
        native = call.id if own else f"functions.{call.name}:{self._number}"
        self._number += 1
        self._native[call.id] = native
        return native

    def of_result(self, identity: str | None) -> str:
        """The id of the call that a result answers."""
        return self._native.get(identity or "", identity or "")


def _calls(turn: Turn, ids: _Ids) -> str:
    if not turn.calls:
        return ""
    calls = "".join(
        f"{MARKS.call_begin}{ids.of_call(call)}{MARKS.separator}{call.arguments}{MARKS.call_end}"
        for call in turn.calls
    )
    return f"{MARKS.calls_begin}{calls}{MARKS.calls_end}"


def _render(conversation: Conversation, reasons: bool, opens: bool) -> str:
    """The prompt. Reasoning is kept in the turns since the last one without calls."""
    turns, ids = conversation.turns, _Ids()
    answered = max(
        (i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.calls), default=-1
    )
    parts = [_declared(conversation.offered)] if conversation.offered else []
    if not turns or turns[0].role not in ("system", "developer"):
        parts.append(f"{_head('system', 'system')}{_SYSTEM}{_END}")
    for position, turn in enumerate(turns):
        if turn.role in ("system", "developer"):
            parts += (_head("system", turn.name or "system"), turn.text, _END)
        elif turn.role == "user":
            parts += (_head("user", turn.name or "user"), turn.text, _END)
        elif turn.role == "tool":
            parts += (
                _head("system", turn.name or "tool"),
                f"## Return of {ids.of_result(turn.call_id)}\n",
                turn.text,
                _END,
            )
        else:
            thought = turn.reasoning if position > answered else ""
            parts += (_head("assistant", turn.name or "assistant"), f"<think>{thought}</think>" * reasons)
            parts += (turn.text, _calls(turn, ids))
            parts.append("" if conversation.resume and position + 1 == len(turns) else _END)
    if conversation.generate and not conversation.resume:
        parts.append(_head("assistant", "assistant"))
        if reasons and conversation.wants_reasoning is False:
            parts.append("<think></think>")
        elif opens:
            parts.append("<think>")
    return "".join(parts)


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """K2 Instruct's prompt, without reasoning."""
    return _render(conversation, reasons=False, opens=False)


def render_thinking(conversation: Conversation, tokens: ControlTokens) -> str:
    """K2 Thinking's prompt."""
    return _render(conversation, reasons=True, opens=False)


def render_k25(conversation: Conversation, tokens: ControlTokens) -> str:
    """K2.5's prompt, which opens the reasoning."""
    return _render(conversation, reasons=True, opens=True)


KIMI_K2 = ChatFormat(
    "kimi_k2",
    render,
    lambda tools, tokens=frozenset(): DelimitedCalls(MARKS, True, tokens, tools),
    markup=MARKS.all,
    stops=(_END,),
    syntax=JsonCalls(
        (MARKS.call_begin,),
        ((f"functions.{{name}}:{{index}}{MARKS.separator}", MARKS.call_end),),
        MARKS.all,
        Section(MARKS.calls_begin, "", MARKS.calls_end),
    ),
)
KIMI_K2_THINKING = replace(
    KIMI_K2, name="kimi_k2_thinking", render=render_thinking, tags=THINK, efforts=("none",)
)
KIMI_K25 = replace(KIMI_K2_THINKING, name="kimi_k25", render=render_k25)
