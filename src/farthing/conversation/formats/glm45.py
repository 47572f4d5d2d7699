"""GLM: turns after role tokens, calls as XML. GLM-4.5 and 4.6 put line breaks between tags and write
`/nothink` into the user's text; GLM-4.7, 4.7-Flash and 5 do neither, and their prompts open the reasoning.
"""

from __future__ import annotations

import json
from dataclasses import replace

from farthing.conversation.arguments import object_of
from farthing.conversation.formats.base import ChatFormat, ControlTokens
from farthing.conversation.parse.base import THINK
from farthing.conversation.parse.glm import CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END, GlmCalls
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import Conversation, Tool, Turn

# The text the models were trained with, up to the example of a call.
_TOOLS = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
@@SCHEMAS@@
</tools>

For each function call, output the function name and arguments within the following XML format:
"""


def _described(tools: tuple[Tool, ...], line: str) -> str:
    """The tools and an example of a call. line: what stands between tags."""
    documents = ({"type": "function", "function": tool.document()} for tool in tools)
    schemas = "\n".join(json.dumps(document, ensure_ascii=False) for document in documents)
    pairs = (f"{KEY}{{arg-key-{n}}}{KEY_END}{line}{VALUE}{{arg-value-{n}}}{VALUE_END}{line}" for n in (1, 2))
    example = f"{CALL}{{function-name}}{line}{''.join(pairs)}...{line}{CALL_END}"
    return _TOOLS.replace("@@SCHEMAS@@", schemas) + example


def _calls(turn: Turn, line: str) -> str:
    parts: list[str] = []
    for call in turn.calls:
        parts.append(f"{line}{CALL}{call.name}{line}")
        for key, value in object_of(call.arguments).items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts.append(f"{KEY}{key}{KEY_END}{line}{VALUE}{text}{VALUE_END}{line}")
        parts.append(CALL_END)
    return "".join(parts)


def _render(conversation: Conversation, older: bool) -> str:
    """The prompt. Reasoning before the last user turn is dropped."""
    silent, line = conversation.wants_reasoning is False, "\n" if older else ""
    turns = conversation.turns
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    parts = ["[gMASK]<sop>"]
    if conversation.offered:
        parts += ("<|system|>", _described(conversation.offered, line))
    before = None
    for position, turn in enumerate(turns):
        if turn.role in ("system", "developer"):
            parts += ("<|system|>", line, turn.text)
        elif turn.role == "user":
            mute = older and silent and not turn.text.endswith("/nothink")
            parts += ("<|user|>", line, turn.text, "/nothink" if mute else "")
        elif turn.role == "tool":
            parts += (
                "" if before == "tool" else "<|observation|>",
                f"{line}<tool_response>{line}",
                turn.text,
            )
            parts.append(f"{line}</tool_response>")
        else:
            thought = turn.reasoning.strip() if position > last else ""
            opening = "<think>" if older or (turn.reasoning and position > last) else ""
            parts += (f"<|assistant|>{line}", opening, thought, "</think>")
            parts += (line + turn.text.strip() if turn.text.strip() else "", _calls(turn, line))
        before = turn.role
    if conversation.generate and not conversation.resume:
        opening = ("\n<think></think>" if silent else "") if older else ("</think>" if silent else "<think>")
        parts += ("<|assistant|>", opening)
    return "".join(parts)


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt of GLM-4.5 and 4.6."""
    return _render(conversation, older=True)


def render_47(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt of GLM-4.7 and 5."""
    return _render(conversation, older=False)


_MARKS = frozenset((CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END))


def _syntax(line: str) -> TaggedCalls:
    """The grammar of calls. line: what stands between tags."""
    parameter = f"{KEY}{{name}}{KEY_END}{line}{VALUE}"
    return TaggedCalls(
        openers=(CALL,),
        begin="{name}",
        string=parameter,
        json=parameter,
        value_end=VALUE_END,
        end=CALL_END,
        marks=_MARKS,
        section=Section(line, line, ""),
        key="[^<>\\n]{1,256}",
    )


GLM45 = ChatFormat(
    "glm45",
    render,
    lambda tools, tokens=frozenset(): GlmCalls(tools),
    THINK,
    efforts=("none",),
    markup=_MARKS,
    stops=("<|user|>", "<|observation|>"),
    syntax=_syntax("\n"),
)
GLM47 = replace(GLM45, name="glm47", render=render_47, syntax=_syntax(""))
