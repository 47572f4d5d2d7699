"""Calls as JSON objects that hold the function's name: Hermes and Qwen, Mistral, Granite, Llama.

    opener, {"name": NAME, "arguments": {…}} or a list of them, closer

Mistral's newer models write `[TOOL_CALLS]NAME[ARGS]{…}` instead. Where the members come in this order, the
arguments stream; an object with another order is parsed when it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from farthing.conversation.arguments import parsed
from farthing.conversation.base import MAX_HEAD, THINK, Machine
from farthing.conversation.scan import JsonObject, Trailing, literals
from farthing.conversation.types import Delta, Tool

_STRING = r'"(?:[^"\\]|\\.)*"'
# Members before the arguments, of which only the name matters.
_HEAD = re.compile(
    rf'\{{\s*(?:"(?:type|id)"\s*:\s*{_STRING}\s*,\s*)*"name"\s*:\s*({_STRING})\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)',
    re.DOTALL,
)
_NAMING = re.compile(r'\{\s*(?:"name"\s*:\s*"[^"]*"\s*,\s*)?"(?:name"\s*:\s*")?[^"]*')  # a string of the head
_MEMBERS = {"name", "arguments", "parameters", "id", "type", "function"}
_BARE = ('{"name":"', '{"type":"function","name":"')  # the beginnings of a call without an opener
_KEYS = (',"parameters":{', ',"arguments":{')
_BETWEEN = " \t\r\n,;[]}`"  # around the calls of a list, and brackets too many


@dataclass(frozen=True, slots=True)
class CallMarks:
    """The markup of one format. close: empty if the JSON's end is the call's. separators: what follows a name
    that is written before its arguments. bare: an answer that begins with a call needs no opener."""

    open: str
    close: str = ""
    separators: tuple[str, ...] = ()
    bare: bool = False

    @property
    def all(self) -> frozenset[str]:
        """Every mark."""
        return frozenset(filter(None, (self.open, self.close, *self.separators)))


class NamedJsonCalls(Machine):
    """Parses the calls described above.

    tokens: the marks known to be special tokens, which end a call even within a string. The tag that closes
    the reasoning ends a call as well, but not within a string of its arguments.
    """

    def __init__(
        self, marks: CallMarks, tools: tuple[Tool, ...] = (), tokens: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self._marks, self._tokens = marks, tokens - {THINK.close}
        self._known = {tool.name for tool in tools}
        self._own, self._until = literals(marks.all), literals(marks.all | {THINK.close})
        self._trailing = Trailing()
        self._blank = False  # a call has just ended: drop white space before text
        self._first = False  # nothing has followed the opener so far
        self._seen: list[str] = []  # of a call, until it begins
        self._name: str | None = None  # written before the arguments
        self._object = JsonObject()  # the whole call
        self._inner: JsonObject | None = None  # its arguments, while they stream
        self._sure = False  # the object has no name before its arguments, or has streamed them
        self._begun = False
        self._state = self._start if marks.bare else self._outside

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        if self._state == self._items:
            return self._first or bool(self._marks.close)
        return self._state not in (self._start, self._outside)

    def finish(self) -> list[Delta]:
        """Flush what was held back. A call truncated by the token limit keeps the arguments it has."""
        rest, self._buffer = self._buffer, ""
        if self._state == self._in_object and not self._object.quoted:
            rest = self._own.unless_cut(rest)
        elif self._state == self._outside:
            self._outer("" if self._blank and self._own.cut(rest) else self._own.unless_cut(rest))
            self._text(self._trailing.take())
        elif self._state == self._start and len(rest.strip()) < len('{"'):
            self._text(rest)
        if self._state == self._in_object:
            self._in_call(rest)
            text = "".join(self._seen)
            if not self._begun and set(parsed(text) or ()) - _MEMBERS:
                self._text(text)
        elif self._state == self._in_name and re.search(r"\s", text := "".join(self._seen).strip()):
            self._text(text)
        return self._taken()

    # States.

    def _start(self) -> bool:
        """Nothing but white space so far."""
        body = self._buffer.lstrip()
        if not body:
            return False
        head = _HEAD.match(body, 0, MAX_HEAD)
        if head and json_text(head[1]) in self._known:
            self._open_object()
            self._buffer = body
        elif head or len(body) >= MAX_HEAD or not self._may_call("".join(body.split())):
            self._state = self._outside
        else:
            return False
        return True

    def _may_call(self, text: str) -> bool:
        """Whether this text without white space may become a call of an offered function."""
        bare = next((bare for bare in _BARE if text.startswith(bare)), None)
        if bare is None:
            return any(bare.startswith(text) for bare in _BARE)
        name, closed, after = text.removeprefix(bare).partition('"')
        if not closed:
            return any(known.startswith(name) for known in self._known)
        return name in self._known and any(_alike(after, key) for key in _KEYS)

    def _outside(self) -> bool:
        return self._until_mark(self._outer)

    def _items(self) -> bool:
        return self._until_mark(self._between)

    def _in_name(self) -> bool:
        return self._until_mark(self._naming)

    def _in_object(self) -> bool:
        return self._until_mark(self._in_call)

    # What the states do with text. They put back what belongs to the next state.

    def _outer(self, text: str) -> None:
        if self._blank:
            text = text.lstrip()
        if text:
            self._blank = False
            self._text(self._trailing.push(text))

    def _between(self, text: str) -> None:
        """Before the first call, and after each."""
        text = text.lstrip(_BETWEEN)
        if not text:
            return
        self._buffer = text + self._buffer
        if text[0] == "{":
            self._open_object()
        elif self._first and self._marks.separators:
            self._seen, self._name, self._state = [], None, self._in_name
        else:
            self._state = self._outside

    def _naming(self, text: str) -> None:
        name, brace, rest = text.partition("{")
        self._seen.append(name)
        head = "".join(self._seen)
        called = (head if self._name is None else self._name).strip()
        if brace and len(head) <= MAX_HEAD and self._callable(called):
            self._open_object()
            self._start_call(called)
            self._buffer = brace + rest + self._buffer
        elif brace or len(head) > MAX_HEAD:  # the opener was only mentioned
            self._state = self._outside
            self._buffer = brace + rest + self._buffer
            self._outer(head)

    def _in_call(self, text: str) -> None:
        end = self._object.push(text)
        self._member(text if end < 0 else text[:end])
        if end >= 0:
            self._close_object()
            self._buffer = text[end:] + self._buffer

    # Shared by the states.

    def _open_object(self) -> None:
        self._object, self._inner, self._seen = JsonObject(), None, []
        self._sure = self._begun = self._first = False
        self._state = self._in_object

    def _start_call(self, name: str) -> None:
        self._trailing.take()  # white space before a call
        self._begin(name)
        self._begun, self._inner, self._seen = True, JsonObject(), []

    def _member(self, text: str) -> None:
        if self._inner is not None:
            end = self._inner.push(text)
            self._arguments(text if end < 0 else text[:end])
            if end >= 0:
                self._inner, self._sure = None, True
        elif not self._begun:
            self._seen.append(text)
            if not self._sure:
                self._read_head("".join(self._seen))

    def _read_head(self, text: str) -> None:
        head = _HEAD.match(text, 0, MAX_HEAD)
        if head and self._callable(name := json_text(head[1])):
            self._start_call(name)
            self._member(text[head.end() :])
        else:
            self._sure = head is not None or len(text) >= MAX_HEAD

    def _close_object(self) -> None:
        """The object is complete, or a mark ends it."""
        text, self._seen, self._state = "".join(self._seen), [], self._items
        if self._begun:
            return
        call = parsed(text) or {}
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = parsed(arguments)
        if isinstance(name, str) and self._callable(name) and isinstance(arguments, dict):
            self._start_call(name)
            self._arguments(json.dumps(arguments, ensure_ascii=False))
        else:
            self._outer(text)

    def _callable(self, name: str) -> bool:
        """Whether a function may have this name; otherwise the model wrote about calls instead of calling."""
        return name in self._known or re.fullmatch(r'[^\s{}"<>()]+', name) is not None

    def _until_mark(self, take: Callable[[str], object]) -> bool:
        """Pass the text before the next mark to `take`, then handle the mark; False: wait for more text."""
        found = self._until.find(self._buffer)
        size = found[0] if found else self._until.ready(self._buffer)
        if size:
            take(self._take(size))
            return True
        if found is None:
            return False
        mark = self._take(found[1])
        if self._state == self._in_object and self._in_string(mark):
            take(mark)
        else:
            self._mark(mark)
        return True

    def _in_string(self, mark: str) -> bool:
        """Whether a mark is part of a string of the call, but not of its name."""
        if not self._object.quoted or mark in self._tokens:
            return False
        return self._begun or _NAMING.fullmatch("".join(self._seen)) is None

    def _mark(self, mark: str) -> None:
        before = self._state
        if self._state == self._in_name:
            if mark in self._marks.separators:
                self._name = "".join(self._seen) if self._name is None else self._name
                self._seen = []
                return
            self._outer("".join(self._seen).strip())
        elif self._state == self._in_object:
            self._close_object()
        if mark == THINK.close:
            self._state = self._outside
            self._outer(mark)
        elif mark == self._marks.open:
            self._trailing.take()
            self._first, self._state = True, self._items
        elif mark == self._marks.close or before == self._outside:
            self._trailing.take()
            self._blank, self._state = True, self._outside


def json_text(literal: str) -> str:
    """The value of a JSON string; empty if it is invalid."""
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return ""


def _alike(start: str, literal: str) -> bool:
    return start.startswith(literal) or literal.startswith(start)
