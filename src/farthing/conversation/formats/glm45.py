"""GLM-4.5 and its successors, GLM-5 included: turns after role tokens, calls as XML."""

from __future__ import annotations

import json

from farthing.conversation.arguments import object_of
from farthing.conversation.formats.base import ChatFormat, ControlTokens
from farthing.conversation.formats.dsml import last_request
from farthing.conversation.parse.base import THINK
from farthing.conversation.parse.glm import CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END, GlmCalls
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import Conversation, Tool, Turn

# The text the model was trained with.
_TOOLS = f"""
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
@@SCHEMAS@@
</tools>

For each function call, output the function name and arguments within the following XML format:
{CALL}{{function-name}}
{KEY}{{arg-key-1}}{KEY_END}
{VALUE}{{arg-value-1}}{VALUE_END}
{KEY}{{arg-key-2}}{KEY_END}
{VALUE}{{arg-value-2}}{VALUE_END}
...
{CALL_END}"""


def _described(tools: tuple[Tool, ...]) -> str:
    documents = ({"type": "function", "function": tool.document()} for tool in tools)
    schemas = "\n".join(json.dumps(document, ensure_ascii=False) for document in documents)
    return _TOOLS.replace("@@SCHEMAS@@", schemas)


def _calls(turn: Turn) -> str:
    parts: list[str] = []
    for call in turn.calls:
        parts.append(f"\n{CALL}{call.name}\n")
        for key, value in object_of(call.arguments).items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts.append(f"{KEY}{key}{KEY_END}\n{VALUE}{text}{VALUE_END}\n")
        parts.append(CALL_END)
    return "".join(parts)


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt. Reasoning before the last user turn is dropped."""
    silent = conversation.thinking is False or conversation.effort == "none"
    turns = list(conversation.turns)
    last = last_request(turns)
    parts = ["[gMASK]<sop>"]
    if conversation.offered:
        parts += ("<|system|>", _described(conversation.offered))
    before = None
    for position, turn in enumerate(turns):
        if turn.role in ("system", "developer"):
            parts += ("<|system|>\n", turn.text)
        elif turn.role == "user":
            mute = silent and not turn.text.endswith("/nothink")
            parts += ("<|user|>\n", turn.text, "/nothink" if mute else "")
        elif turn.role == "tool":
            parts += ("" if before == "tool" else "<|observation|>", "\n<tool_response>\n", turn.text)
            parts.append("\n</tool_response>")
        else:
            thought = turn.reasoning.strip() if position > last else ""
            parts += ("<|assistant|>\n", f"<think>{thought}</think>")
            parts += ("\n" + turn.text.strip() if turn.text.strip() else "", _calls(turn))
        before = turn.role
    if conversation.generate and not conversation.resume:
        parts += ("<|assistant|>", "\n<think></think>" if silent else "")
    return "".join(parts)


_MARKS = frozenset((CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END))
_PARAMETER = f"{KEY}{{name}}{KEY_END}\n{VALUE}"
GLM45 = ChatFormat(
    "glm45",
    render,
    lambda tools, tokens=frozenset(): GlmCalls(tools),
    THINK,
    efforts=("none",),
    markup=_MARKS,
    stops=("<|user|>", "<|observation|>"),
    syntax=TaggedCalls(
        openers=(CALL,),
        begin="{name}",
        string=_PARAMETER,
        json=_PARAMETER,
        value_end=VALUE_END,
        end=CALL_END,
        marks=_MARKS,
        section=Section("\n", "\n", ""),
        key="[^<>\\n]{1,256}",
    ),
)
