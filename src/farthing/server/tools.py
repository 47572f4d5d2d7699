"""Reads tool calls out of a model's text, as it streams.

Two notations: DeepSeek's own tokens (V3 and R1 with a fenced JSON block, V3.1 with bare JSON), and the JSON
list that structured output forces when the caller demands a call.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from farthing.server.reasoning import held_back

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_FENCE = re.compile(r"\s*```[a-z]*\n?")
_OPEN_FENCE = re.compile(r"\s*(?:`{1,2}|```[a-z]*)?")
# The end of an argument text that might still turn out to be its closing fence or tag.
_TAIL = re.compile(r"\s*`{0,3}\s*(?:<(?:｜[^<>]*)?)?$")


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins: its position in the answer, its id and the function it names."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: a piece of a JSON text."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


class ToolParser(Protocol):
    """Text chunks in, events out."""

    calls: int  # calls begun so far

    def push(self, text: str) -> list[Event]:
        """What can be told after one more chunk."""

    def finish(self) -> list[Event]:
        """What is left when the output ends."""


def new_call_id() -> str:
    """An id for a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class PlainParser:
    """No tools: all text is content."""

    calls = 0

    def push(self, text: str) -> list[Event]:
        """The text itself."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing is ever held back."""
        return []


class _Machine:
    """States that consume from a buffer and return events, or None when they need more text."""

    def __init__(self) -> None:
        self._buffer = ""
        self._state: Callable[[], list[Event] | None]
        self.calls = 0

    def push(self, text: str) -> list[Event]:
        """What can be told after one more chunk."""
        self._buffer += text
        events: list[Event] = []
        while (step := self._state()) is not None:
            events += step
        return events

    def _begin_call(self, name: str) -> CallStart:
        self.calls += 1
        return CallStart(self.calls - 1, new_call_id(), name)

    def _arguments(self, text: str) -> list[Event]:
        return [CallArguments(self.calls - 1, text)] if text else []


class DeepSeekParser(_Machine):
    """DeepSeek's notation: text, then calls between special tokens (see the module's constants)."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._text
        self._sent_arguments = False

    def finish(self) -> list[Event]:
        """What was held back; a call cut off by the token limit keeps the arguments it has."""
        rest, self._buffer = self._buffer, ""
        if self._state == self._text:
            return [Content(rest)] if rest else []
        return self._arguments(_unfenced(rest)) if self._state == self._in_arguments else []

    def _text(self) -> list[Event] | None:
        found = [at for tag in (CALLS_BEGIN, CALL_BEGIN) if (at := self._buffer.find(tag)) >= 0]
        if found:
            text, self._buffer = self._buffer[: min(found)].rstrip(), self._buffer[min(found) :]
            self._state = self._between
            return [Content(text)] if text else []
        held = max(held_back(self._buffer, CALLS_BEGIN), held_back(self._buffer, CALL_BEGIN))
        ready = self._buffer[: len(self._buffer) - held]
        self._buffer = self._buffer[len(ready) :]
        return [Content(ready)] if ready else None

    def _between(self) -> list[Event] | None:
        self._buffer = self._buffer.lstrip().removeprefix(CALLS_BEGIN).lstrip()
        if self._buffer.startswith(CALL_BEGIN):
            self._buffer, self._state = self._buffer[len(CALL_BEGIN) :], self._head
            return []
        if self._buffer.startswith(CALLS_END):
            self._buffer, self._state = self._buffer[len(CALLS_END) :].lstrip(), self._text
            return []
        if any(tag.startswith(self._buffer) for tag in (CALL_BEGIN, CALLS_END)):
            return None
        self._state = self._text  # the model left its own notation: the rest is text
        return []

    def _head(self) -> list[Event] | None:
        head, separator, rest = self._buffer.partition(SEPARATOR)
        if not separator:
            return None
        name = head.strip()
        if name == "function":  # V3 and R1: `function<sep>NAME`, then a fenced block
            name, newline, rest = rest.partition("\n")
            if not newline:
                return None
        self._buffer, self._state, self._sent_arguments = rest, self._before_arguments, False
        return [self._begin_call(name.strip())]

    def _before_arguments(self) -> list[Event] | None:
        if _OPEN_FENCE.fullmatch(self._buffer):
            return None
        if fence := _FENCE.match(self._buffer):
            self._buffer = self._buffer[fence.end() :]
        self._state = self._in_arguments
        return []

    def _in_arguments(self) -> list[Event] | None:
        text, tag, rest = self._buffer.partition(CALL_END)
        if tag:
            self._buffer, self._state = rest, self._between
            text = _unfenced(text)
            return self._arguments(text if text or self._sent_arguments else "{}")
        tail = _TAIL.search(text)
        ready = text[: tail.start()] if tail else text
        self._buffer = text[len(ready) :]
        self._sent_arguments = self._sent_arguments or bool(ready)
        return self._arguments(ready) or None


def _unfenced(text: str) -> str:
    """Arguments without the fence that closes them."""
    return text.rstrip().removesuffix("```").rstrip()


class JsonListParser(_Machine):
    """`[{"name": …, "parameters": {…}}, …]`, as `calls_schema` makes the model write it."""

    _HEADER = re.compile(r'\s*[\[,]\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\{)')

    def __init__(self) -> None:
        super().__init__()
        self._state = self._before
        self._depth = 0
        self._quoted = self._escaped = False

    def finish(self) -> list[Event]:
        """Nothing of a call is held back; text that never became one is given as content."""
        return [Content(self._buffer)] if self._buffer.strip() and not self.calls else []

    def _before(self) -> list[Event] | None:
        header = self._HEADER.match(self._buffer)
        if not header:
            return None
        self._buffer, self._state = self._buffer[header.end() :], self._within
        return [self._begin_call(json.loads(header[1]))]

    def _within(self) -> list[Event] | None:
        for position, character in enumerate(self._buffer):
            if self._closes(character):
                text, self._buffer = self._buffer[: position + 1], self._buffer[position + 1 :]
                self._state = self._after
                return self._arguments(text)
        text, self._buffer = self._buffer, ""
        return self._arguments(text) or None

    def _closes(self, character: str) -> bool:
        """Follow one character of a JSON object; whether it ends the object."""
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _after(self) -> list[Event] | None:
        rest = self._buffer.lstrip()
        if not rest.startswith("}"):
            return None
        self._buffer, self._state = rest[1:], self._before
        return []


class ArgumentsParser(_Machine):
    """One call of a function known beforehand: the whole text is its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._state = self._pass

    def finish(self) -> list[Event]:
        """Nothing is ever held back."""
        return []

    def _pass(self) -> list[Event] | None:
        if not self._buffer:
            return None
        start: list[Event] = [] if self.calls else [self._begin_call(self._name)]
        text, self._buffer = self._buffer, ""
        return start + self._arguments(text)


def calls_schema(functions: Iterable[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of one or more calls of the given (name, parameters schema) functions."""
    schemas = dict(functions)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in schemas
    ]
    return {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        **({} if parallel else {"maxItems": 1}),
        "$defs": {name: _rebased(schema, f"#/$defs/{name}") for name, schema in schemas.items()},
    }


def _rebased(schema: Any, root: str) -> Any:
    """A schema whose references to its own root work at another place."""
    if isinstance(schema, list):
        return [_rebased(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _rebased(value, root)
        for key, value in schema.items()
    }
