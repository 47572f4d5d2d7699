"""DeepSeek V3 and R1: calls between special tokens, arguments in a fenced block.

The checkpoints' own templates never print tools, so the tools are described in the system prompt. Reasoning
of earlier turns is dropped, as the models were trained.
"""

from __future__ import annotations

import json
from dataclasses import replace

from farthing.conversation.base import THINK, ChatFormat, ControlTokens
from farthing.conversation.formats.delimited import DEEPSEEK as MARKS
from farthing.conversation.formats.delimited import DelimitedCalls
from farthing.conversation.strict import JsonCalls, Section
from farthing.conversation.types import Conversation, Tool, Turn

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"


def system_text(conversation: Conversation) -> str:
    """The text of all system and developer turns, which these formats put first."""
    roles = ("system", "developer")
    return "\n\n".join(turn.text for turn in conversation.turns if turn.role in roles and turn.text)


def after_reasoning(text: str) -> str:
    """A text without the reasoning that a client left in front of it, in its tags."""
    begins = text.lstrip().startswith(THINK.open) and THINK.close in text
    return text.partition(THINK.close)[2] if begins else text


def _described(tools: tuple[Tool, ...]) -> str:
    lines = "".join("\n" + json.dumps(tool.document(), ensure_ascii=False) for tool in tools)
    call = f"{MARKS.call_begin}function{MARKS.separator}NAME\n```json\nARGUMENTS\n```{MARKS.call_end}"
    return (
        f"## Tools\nYou may call these functions:{lines}\nTo call one, answer with\n"
        f"{MARKS.calls_begin}{call}{MARKS.calls_end}"
    )


def _calls(turn: Turn) -> str:
    if not turn.calls:
        return ""
    calls = "\n".join(
        f"{MARKS.call_begin}function{MARKS.separator}{call.name}\n```json\n{call.arguments}\n```{MARKS.call_end}"
        for call in turn.calls
    )
    return f"{MARKS.calls_begin}{calls}{MARKS.calls_end}"


def render(conversation: Conversation, tokens: ControlTokens, opening: str = "") -> str:
    """The prompt. opening: the beginning of the assistant's turn."""
    head = [system_text(conversation)] if system_text(conversation) else []
    if conversation.offered:
        head.append(_described(conversation.offered))
    parts = [tokens.bos, "\n\n".join(head)]
    after_tool = False
    turns = [turn for turn in conversation.turns if turn.role not in ("system", "developer")]
    for position, turn in enumerate(turns):
        following = turns[position + 1].role if position + 1 < len(turns) else None
        if turn.role == "user":
            parts += (USER, turn.text)
        elif turn.role == "assistant":
            open_turn = conversation.resume and following is None
            parts += ("" if after_tool else ASSISTANT, after_reasoning(turn.text).strip(), _calls(turn))
            parts.append("" if open_turn else tokens.eos)
        else:
            parts += ("\n" if after_tool else OUTPUTS_BEGIN, OUTPUT_BEGIN, turn.text, OUTPUT_END)
            parts.append("" if following == "tool" else OUTPUTS_END)
        after_tool = turn.role == "tool"
    if conversation.generate and not conversation.resume:
        parts += ("" if after_tool else ASSISTANT, opening)
    return "".join(parts)


def render_r1(conversation: Conversation, tokens: ControlTokens) -> str:
    """R1's prompt, which opens the reasoning. R1 always reasons."""
    return render(conversation, tokens, "<think>\n")


def _parser(tools: tuple[Tool, ...], tokens: frozenset[str] = frozenset()) -> DelimitedCalls:
    return DelimitedCalls(MARKS, tokens=tokens)


SECTION = Section(MARKS.calls_begin, "\n", MARKS.calls_end)
STYLE = (f"function{MARKS.separator}{{name}}\n```json\n", f"\n```{MARKS.call_end}")
_SYNTAX = JsonCalls((MARKS.call_begin,), (STYLE,), MARKS.all, SECTION)
V3 = ChatFormat("deepseek_v3", render, _parser, markup=MARKS.all, syntax=_SYNTAX, strips=True)
R1 = replace(V3, name="deepseek_r1", render=render_r1, tags=THINK)
