"""The calls of GLM-4.5 and its successors.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

The format does not say which values are strings: the tool's schema does.
"""

from __future__ import annotations

from farthing.conversation.parse.base import MAX_HEAD
from farthing.conversation.parse.parameters import ParameterCalls
from farthing.conversation.scan import literals
from farthing.conversation.types import Tool

CALL, CALL_END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_TAGS = literals(frozenset((CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END)))


class GlmCalls(ParameterCalls):
    """Parses the calls described above."""

    openers = frozenset((CALL,))
    tags = _TAGS

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        super().__init__(tools)
        self._name: list[str] = []  # of a call or of a parameter
        self._named = False  # the call's name is complete

    # States.

    def _in_call(self) -> bool:
        """The call's name, then parameters."""
        return self._until_tag(self._head)

    def _in_key(self) -> bool:
        return self._until_tag(self._name.append)

    # Shared by the states.

    def _head(self, text: str) -> None:
        if self._named:
            self._stray.append(text)
            return
        line, newline, rest = (text if self._name else text.lstrip()).partition("\n")
        if line:
            self._name.append(line)
        if sum(map(len, self._name)) > MAX_HEAD:  # too long for a name: it is text
            self._state = self._outside
            self._outer("".join(self._name) + newline + rest)
        elif newline:
            self._complete_name()
            self._stray.append(rest)

    def _complete_name(self) -> None:
        self._named = True
        if name := "".join(self._name).strip():
            self._start_call(name)

    def _enter(self, tag: str) -> None:
        if self._state == self._in_value:
            if tag in (CALL, KEY_END, VALUE):  # not structure here: part of the value
                self._push_value(tag)
                return
            self._end_value()
        if self._state == self._in_call and not self._named:
            self._complete_name()
        match tag:
            case "<tool_call>":
                self._end_call()
                self._name, self._named, self._state = [], False, self._in_call
            case "<arg_key>" if self._open:
                self._name, self._state = [], self._in_key
            case "<arg_value>" if self._open and self._state in (self._in_key, self._in_call):
                self._start_value("".join(self._name).strip(), None)
                self._state = self._in_value
            case "</tool_call>":
                self._end_call()
                self._trailing.take()
                self._blank, self._state = True, self._outside
            case _ if self._open and tag != KEY_END:
                self._state = self._in_call
            case _:
                pass
