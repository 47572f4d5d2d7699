"""DSML, the calls of DeepSeek V3.2 and V4: written into a prompt and parsed from an output."""

from __future__ import annotations

import json
import re
from typing import Any

from farthing.conversation.arguments import object_of
from farthing.conversation.base import MAX_HEAD, THINK
from farthing.conversation.formats.parameters import ParameterCalls
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import Delta, Tool, ToolCall, Turn

# DSML, the calls of DeepSeek V3.2 and V4.
#
#     <｜DSML｜tool_calls>
#     <｜DSML｜invoke name="NAME">
#     <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
#     </｜DSML｜invoke>
#     </｜DSML｜tool_calls>
#
# V3.2 names the section `function_calls`. No DSML tag ever reaches the text: a misplaced tag is dropped.
# The section's own tags are optional, because models omit or misspell them.

MARK = "｜DSML｜"
_OPEN, _CLOSE = f"<{MARK}", f"</{MARK}"
_DOUBLED = ("<｜｜DSML｜｜", "</｜｜DSML｜｜")  # a misspelling that models produce
OPENERS = (_OPEN, _DOUBLED[0])
_BODY = re.compile(r'[^<>"\n]*(?:"[^"\n]*"[^<>"\n]*)*>')  # a tag after its mark
_ATTRIBUTE = re.compile(r'(\w+)\s*=\s*"([^"]*)"')
_NAME = re.compile(r"\s*(\w+)")


class DsmlCalls(ParameterCalls):
    """Parses the calls described above."""

    tags = frozenset((_OPEN, _CLOSE, *_DOUBLED))

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        super().__init__(tools)
        self._within = self._outside  # the state to return to after a tag that is dropped
        self._mark, self._closing = "", False  # of the tag being read
        self._orphaned: list[str] = []  # the value of a parameter outside a call

    def finish(self) -> list[Delta]:
        """See ParameterCalls. A parameter outside a call, with no tag after it, is kept as text."""
        if self._state == self._in_orphan:
            self._buffer, self._state = "".join((*self._orphaned, self._buffer)), self._outside
        return super().finish()

    # States.

    def _in_orphan(self) -> bool:
        return self._until_tag(self._orphaned.append)

    def _in_call(self) -> bool:
        return self._until_tag(self._stray.append)

    def _in_tag(self) -> bool:
        body = _BODY.match(self._buffer)
        if body is None or body.end() > MAX_HEAD or THINK.close in body[0]:
            if body is None and len(self._buffer) <= MAX_HEAD and not self._broken():
                return False
            self._malformed()
            return True
        self._tag(self._take(body.end())[:-1])
        return True

    # Shared by the states.

    def _end_reasoning(self, tag: str) -> None:
        if self._state == self._in_orphan:
            self._stray, self._orphaned = self._orphaned, []
        super()._end_reasoning(tag)

    def _enter(self, tag: str) -> None:
        self._mark, self._closing = tag, tag.startswith("</")
        self._within, self._state = self._state, self._in_tag

    def _broken(self) -> bool:
        """Whether the tag can no longer end: a new line or another tag begins first."""
        if "\n" in self._buffer or THINK.close in self._buffer:
            return True
        return "<" in re.sub(r'"[^"]*("|$)', "", self._buffer)

    def _malformed(self) -> None:
        """Drop a tag that never ends, up to the end of its line, and return to the enclosing state.

        Within a value it is text, unless it looks like part of the call.
        """
        name = _NAME.match(self._buffer)
        if self._within == self._in_value and not (name and self._ends_value(name[1])):
            self._push_value(self._mark)
            self._state = self._in_value
            return
        line = re.match(rf"[^<\n]{{0,{MAX_HEAD}}}", self._buffer)
        assert line is not None
        self._take(line.end())
        self._state = self._within

    def _tag(self, body: str) -> None:
        match = _NAME.match(body)
        kind = match[1] if match else ""
        attributes = dict(_ATTRIBUTE.findall(body))
        in_value = self._within == self._in_value
        self._orphaned = []
        if in_value and not self._ends_value(kind):
            self._push_value(f"{self._mark}{body}>")  # a value may contain other tags
            self._state = self._in_value
            return
        if in_value:
            self._end_value()
        if kind == "parameter" and not self._closing and self._open and attributes.get("name"):
            self._start_value(attributes["name"], attributes.get("string") == "true")
            self._state = self._in_value
        elif kind == "parameter" and not self._closing and not self._open:
            self._state = self._in_orphan
        elif not self._is_structure(kind):
            self._state = self._in_call if self._open else self._outside
        elif kind == "invoke" and not self._closing and self._callable(attributes.get("name", "")):
            self._start_call(attributes["name"])
            self._state = self._in_call
        else:
            self._end_call()
            self._trailing.take()
            self._blank, self._state = True, self._outside

    @classmethod
    def _ends_value(cls, kind: str) -> bool:
        return kind == "parameter" or cls._is_structure(kind)

    @staticmethod
    def _is_structure(kind: str) -> bool:
        return kind == "invoke" or kind.startswith(("tool", "function"))


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
