"""Assembles calls that are written parameter by parameter into one streamed JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from farthing.conversation.arguments import Kinds, is_text, kinds_of, quoted, to_json
from farthing.conversation.base import THINK, Machine
from farthing.conversation.scan import Literals, Trailing, literals
from farthing.conversation.types import Delta, Tool

# Models trained on other formats may wrap all arguments in one parameter with such a name.
_WRAPPERS = ("arguments", "input")


def until(tags: frozenset[str]) -> Literals:
    """What ends a piece of text: the format's tags, or the one that closes the reasoning."""
    return literals(tags | {THINK.close})


class ParameterCalls(Machine):
    """Tracks one call's object; the format's parser reports where calls and values begin and end.

    The tag that closes the reasoning ends a call, but not within a value.
    """

    tags: frozenset[str]

    def __init__(self, tools: tuple[Tool, ...]) -> None:
        super().__init__()
        self._own, self._until = literals(self.tags), until(self.tags)
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._schema: Mapping[str, Any] | None = None
        self._trailing = Trailing()
        self._open = False  # inside a call
        self._count = 0  # parameters of this call
        self._stray: list[str] = []  # text of a call outside its parameters
        self._value: list[str] | None = None  # of the current parameter; None if it streams
        self._key = ""
        self._declared: bool | None = None
        self._kinds: Kinds = None
        self._blank = False  # a section has just ended: drop white space before text
        self._state = self._outside

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._state != self._outside

    def finish(self) -> list[Delta]:
        """Flush what was held back, but not an incomplete tag or name.

        A truncated call keeps what it has and stays unclosed, so that it is not mistaken for a complete one.
        """
        rest, self._buffer = self._buffer, ""
        if self._state == self._outside:
            # After a call, even one character of a tag is the beginning of its section's next one.
            self._outer("" if self._blank and self._own.cut(rest) else self._own.unless_cut(rest))
            self._text(self._trailing.take())
        elif self._state == self._in_value and self._value is None:
            self._push_value(self._own.unless_cut(rest))
        else:
            self._abandon()
        self._open = False
        return self._taken()

    def _abandon(self) -> None:
        """The call ends amid its markup. Text outside its parameters is arguments, or no part of it."""
        text = "".join(self._stray).strip()
        if self._open and not self._count and text.startswith("{"):
            self._arguments(text)
        else:
            self._outer(text)

    def _outside(self) -> bool:
        return self._until_tag(self._outer)

    def _in_value(self) -> bool:
        return self._until_tag(self._push_value)

    def _until_tag(self, take: Callable[[str], object]) -> bool:
        """Pass the text before the next tag to `take`, the tag to the format; False: wait for more text."""
        found = self._until.find(self._buffer)
        size = found[0] if found else self._until.ready(self._buffer)
        if size:
            take(self._take(size))
        if found is None:
            return False
        tag = self._take(found[1] - found[0])
        if tag != THINK.close:
            self._enter(tag)
        elif self._state == self._in_value:
            self._push_value(tag)
        else:
            self._end_reasoning(tag)
        return True

    def _end_reasoning(self, tag: str) -> None:
        """The closing tag of the reasoning, outside a value: the model only wrote about a call."""
        if self._state != self._outside:
            text = "".join(self._stray).strip()
            lost = "" if not self._count and json_object(text) else text
            self._end_call()
            self._state = self._outside
            self._outer(lost)
        self._outer(tag)

    def _enter(self, tag: str) -> None:
        """Handle a tag or the beginning of one."""
        raise NotImplementedError

    def _outer(self, text: str) -> None:
        if self._blank:
            text = text.lstrip()
        if text:
            self._blank = False
            self._text(self._trailing.push(text))

    def _callable(self, name: str) -> bool:
        """Whether a function may have this name; otherwise the model wrote about calls instead of calling."""
        return name in self._schemas or re.fullmatch(r'[^\s{}"<>()]+', name) is not None

    def _start_call(self, name: str) -> None:
        self._end_call()
        self._trailing.take()  # white space before a call
        self._begin(name)
        self._schema, self._open, self._count = self._schemas.get(name), True, 0

    def _call_as_json(self, text: str) -> None:
        """Text in place of a call: a call as a JSON object, which `_end_call` will end, or text."""
        call = json.loads(json_object(text) or "{}")
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(name, str) and self._callable(name) and isinstance(arguments, dict):
            self._start_call(name)
            self._stray = [json.dumps(arguments, ensure_ascii=False)]
        else:
            self._outer(text)

    def _end_call(self) -> None:
        stray, self._stray = "".join(self._stray), []
        if not self._open:
            return
        self._open = False
        self._arguments("}" if self._count else json_object(stray) or "{}")

    def _start_value(self, key: str, declared: bool | None) -> None:
        """declared: the markup says that the value is a string (True) or JSON (False), or nothing (None)."""
        self._key, self._declared, self._kinds = key, declared, kinds_of(self._schema, key)
        self._value = [] if not is_text(declared, self._kinds) else None
        if self._value is None:
            self._arguments(f'{self._separator()}{quoted(key)}: "')

    def _push_value(self, text: str) -> None:
        if self._value is None:
            self._arguments(quoted(text)[1:-1])
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        if self._value is None:
            self._arguments('"')
            return
        text = "".join(self._value)
        if members := self._unwrapped(text):
            self._arguments(self._separator() + members)
        else:
            value = to_json(text, self._declared, self._kinds)
            self._arguments(f"{self._separator()}{quoted(self._key)}: {value}")

    def _separator(self) -> str:
        self._count += 1
        return "{" if self._count == 1 else ", "

    def _unwrapped(self, text: str) -> str:
        """The members of an object that wraps all arguments; empty if the parameter is no such wrapper."""
        known = (self._schema or {}).get("properties")
        if self._count or self._key not in _WRAPPERS or not isinstance(known, Mapping) or self._key in known:
            return ""
        inner = json_object(text)
        return inner[1:-1].strip() if inner and set(json.loads(inner)) <= set(known) else ""


def json_object(text: str) -> str | None:
    """A text that is a JSON object, else None."""
    text = text.strip()
    try:
        return text if text.startswith("{") and isinstance(json.loads(text), dict) else None
    except (ValueError, RecursionError):
        return None
