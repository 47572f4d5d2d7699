"""GLM-4.5 and its successors, GLM-5 included: turns after role tokens, calls as XML."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from farthing.conversation.arguments import object_of
from farthing.conversation.base import MAX_HEAD, THINK, ChatFormat, ControlTokens
from farthing.conversation.formats.parameters import ParameterCalls
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import Conversation, Tool, Turn

# The calls of GLM-4.5 and its successors.
#
#     <tool_call>NAME
#     <arg_key>KEY</arg_key>
#     <arg_value>VALUE</arg_value>
#     </tool_call>
#
# The format does not say which values are strings: the tool's schema does.

CALL, CALL_END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class GlmCalls(ParameterCalls):
    """Parses the calls described above.

    Models leave tags out: that before a key right after the function's name, and that before a value. They
    also write the whole call as JSON, {"name": …, "arguments": {…}}.
    """

    tags = frozenset((CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END))

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        super().__init__(tools)
        self._name: list[str] = []  # of a call or of a parameter
        self._named = False  # the call's name is complete
        self._late: list[str] = []  # text after a key

    # States.

    def _in_call(self) -> bool:
        """The call's name, then parameters."""
        return self._until_tag(self._head)

    def _in_key(self) -> bool:
        return self._until_tag(self._name.append)

    def _after_key(self) -> bool:
        return self._until_tag(self._late.append)

    def _in_json(self) -> bool:
        return self._until_tag(self._late.append)

    # Shared by the states.

    def _head(self, text: str) -> None:
        if self._named:
            self._stray.append(text)
            return
        text = text if self._name else text.lstrip()
        if not self._name and text.startswith("{"):
            self._late, self._named, self._state = [text], True, self._in_json
            return
        line, newline, rest = text.partition("\n")
        if line:
            self._name.append(line)
        if sum(map(len, self._name)) > MAX_HEAD:
            self._unnamed(newline + rest)
        elif newline:
            self._complete_name(newline + rest)

    def _complete_name(self, rest: str = "") -> None:
        self._named = True
        name = "".join(self._name).strip()
        if name and not self._callable(name):
            self._unnamed(rest)
            return
        if name:
            self._start_call(name)
        self._name = []
        self._stray.append(rest)

    def _unnamed(self, rest: str = "") -> None:
        """What follows the call's tag is no function's name: it is text."""
        self._state = self._outside
        self._outer("".join(self._name) + rest)
        self._name = []

    def _split_name(self) -> None:
        """The function's name and the first key, without the tag between them."""
        text = "".join(self._name).strip()
        known = max((name for name in self._schemas if text.startswith(name)), key=len, default="")
        if known and (key := text[len(known) :].strip()):
            self._named = True
            self._start_call(known)
            self._name, self._late, self._state = [key], [], self._after_key

    def _end_json(self) -> None:
        self._call_as_json("".join(self._late).strip())
        self._state = self._in_call

    def _abandon(self) -> None:
        if self._state == self._in_json:
            self._outer("".join(self._late).strip())
            return
        if self._state == self._in_call and not self._named:
            if re.search(r"\s", name := "".join(self._name).strip()):  # more than the beginning of a name
                self._outer(name)
            return
        super()._abandon()

    def _end_reasoning(self, tag: str) -> None:
        if self._state == self._in_call and not self._named:
            self._unnamed()
        elif self._state == self._in_json:
            self._end_json()
        super()._end_reasoning(tag)

    def _enter(self, tag: str) -> None:
        if self._state == self._in_value:
            if tag in (CALL, KEY_END, VALUE):  # not structure here: part of the value
                self._push_value(tag)
                return
            self._end_value()
            self._state = self._in_call
        elif self._state == self._in_json:
            self._end_json()
        if self._state == self._in_call and not self._named:
            if tag == KEY_END:
                self._split_name()
            if not self._named:
                self._complete_name()
        match tag:
            case "<tool_call>":
                self._end_call()
                self._name, self._named, self._state = [], False, self._in_call
            case "<arg_key>" if self._open:
                self._name, self._state = [], self._in_key
            case "</arg_key>" if self._state == self._in_key:
                self._late, self._state = [], self._after_key
            case "<arg_value>" if self._open and "".join(self._name).strip():
                self._start_value("".join(self._name).strip(), None)
                self._name, self._state = [], self._in_value
            case "</arg_value>" if self._state == self._after_key:
                self._start_value("".join(self._name).strip(), None)
                self._push_value("".join(self._late).strip())
                self._end_value()
                self._name, self._state = [], self._in_call
            case "</tool_call>":
                self._end_call()
                self._trailing.take()
                self._blank, self._state = True, self._outside
            case _ if self._state == self._in_key:
                self._state = self._in_call
            case _:
                pass


# GLM: turns after role tokens, calls as XML. GLM-4.5 and 4.6 put line breaks between tags and write
# `/nothink` into the user's text; GLM-4.7, 4.7-Flash and 5 do neither, and their prompts open the
# reasoning.

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
