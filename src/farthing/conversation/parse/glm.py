"""The calls of GLM-4.5 and its successors.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

The format does not say which values are strings: the tool's schema does.
"""

from __future__ import annotations

import json
import re

from farthing.conversation.parse.base import MAX_HEAD
from farthing.conversation.parse.parameters import ParameterCalls, json_object
from farthing.conversation.types import Tool

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
        text = "".join(self._late).strip()
        call = json.loads(json_object(text) or "{}")
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(name, str) and self._callable(name) and isinstance(arguments, dict):
            self._start_call(name)
            self._stray = [json.dumps(arguments, ensure_ascii=False)]
        else:
            self._outer(text)
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
