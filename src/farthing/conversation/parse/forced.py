"""Parses calls that a grammar forces: the JSON list of `calls_schema`, or one function's arguments."""

from __future__ import annotations

import json
import re

from farthing.conversation.deltas import Delta
from farthing.conversation.parse.base import MAX_HEAD, Machine
from farthing.conversation.scan import JsonObject

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NAME = "name"  # stands for any string in the sequence below
_HEADER = ("{", '"name"', ":", _NAME, ",", '"parameters"', ":")


class ListedCalls(Machine):
    """`[{"name": …, "parameters": {…}}, …]`. Anything else is passed on as text."""

    anywhere = False

    def __init__(self) -> None:
        super().__init__()
        self._state = self._before
        self._seen: list[str] = []  # before the first call: text if no call follows
        self._step = 0  # in _HEADER
        self._name = ""
        self._object = JsonObject()

    def finish(self) -> list[Delta]:
        """Pass on text that did not become a call. A call that was cut before its arguments is dropped."""
        if not self.calls and self._state == self._rest:
            text = "".join(self._seen) + self._buffer
            self._text(text if text.strip() else "")
        self._seen, self._buffer = [], ""
        return self._taken()

    def _before(self) -> bool:
        """Between calls: the list's bracket or a comma."""
        self._blanks()
        if not self._buffer:
            return False
        if self._buffer[0] not in "[,":
            self._state = self._rest
            return True
        self._keep(1)
        self._step, self._state = 0, self._header
        return True

    def _header(self) -> bool:
        self._blanks()
        if not self._buffer:
            return False
        if self._step == len(_HEADER):
            self._state = self._within if self._buffer[0] == "{" else self._rest
            if self._state == self._within:
                self._begin(self._name)
                self._object, self._seen = JsonObject(), []
            return True
        wanted = _HEADER[self._step]
        if wanted == _NAME:
            match = _STRING.match(self._buffer)
            if match is None:
                return self._give_up() if len(self._buffer) > MAX_HEAD or self._buffer[0] != '"' else False
            wanted = match[0]
            try:
                self._name = json.loads(wanted)
            except ValueError:
                return self._give_up()
            if not self._name.strip():
                return self._give_up()
        if self._buffer.startswith(wanted):
            self._keep(len(wanted))
            self._step += 1
            return True
        return False if wanted.startswith(self._buffer) else self._give_up()

    def _within(self) -> bool:
        end = self._object.push(self._buffer)
        self._arguments(self._take(len(self._buffer) if end < 0 else end))
        if end >= 0:
            self._state = self._after
        return True

    def _after(self) -> bool:
        self._blanks()
        if not self._buffer:
            return False
        self._state = self._before if self._take(1) == "}" else self._rest
        return True

    def _rest(self) -> bool:
        """Text after the list, or text that is not a list."""
        text = self._take(len(self._buffer))
        if not self.calls:
            self._seen.append(text)
        return True

    def _give_up(self) -> bool:
        self._state = self._rest
        return True

    def _keep(self, size: int) -> None:
        text = self._take(size)
        if not self.calls:
            self._seen.append(text)

    def _blanks(self) -> None:
        self._keep(len(self._buffer) - len(self._buffer.lstrip()))


class NamedCall(Machine):
    """One call of a known function: the whole text is its arguments."""

    anywhere = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self._function = name
        self._state = self._pass

    def finish(self) -> list[Delta]:
        """Nothing is ever held back."""
        return []

    def _pass(self) -> bool:
        if not self.calls:
            self._begin(self._function)
        self._arguments(self._take(len(self._buffer)))
        return True
