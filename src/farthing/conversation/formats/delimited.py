"""Calls between special tokens, with JSON arguments: DeepSeek V3, R1 and V3.1, Kimi K2.

    section begin, then for each call: call begin, head, separator, arguments, call end; section end

The head is the function's name (V3.1), the word `function` before a line with the name (V3, R1), or
`functions.NAME:INDEX` (Kimi). V3 and R1 fence the arguments as a code block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from farthing.conversation.base import MAX_HEAD, THINK, Machine
from farthing.conversation.scan import JsonObject, Trailing, literals
from farthing.conversation.types import Delta, Tool, new_call_id

_FENCE = re.compile(r"`{1,3}[a-z]{0,12}")
_AFTER = " \t\r\n`}]"  # what may follow a call's arguments: a fence, or brackets too many


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens of one format."""

    calls_begin: str
    calls_end: str
    call_begin: str
    call_end: str
    separator: str
    misspelled: tuple[str, ...] = ()  # marks of a section that models write instead

    @property
    def all(self) -> frozenset[str]:
        """Every one of them."""
        return frozenset((self.calls_begin, self.calls_end, self.call_begin, self.call_end, self.separator))


DEEPSEEK = Marks(
    calls_begin="<｜tool▁calls▁begin｜>",
    calls_end="<｜tool▁calls▁end｜>",
    call_begin="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    separator="<｜tool▁sep｜>",
)
KIMI = Marks(
    calls_begin="<|tool_calls_section_begin|>",
    calls_end="<|tool_calls_section_end|>",
    call_begin="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    separator="<|tool_call_argument_begin|>",
    misspelled=("<|tool_call_section_begin|>", "<|tool_call_section_end|>"),
)


_NAMELESS = re.compile(r"(call[_-]?)?\d+|(call|chatcmpl-tool|toolu)[_-]\w+")  # ids of other servers
_SANITIZED = re.compile(r"(?:functions[._]?)?(.*?)[:_]?\d*", re.DOTALL)


def function_of(identity: str, tools: tuple[Tool, ...]) -> str:
    """The function that an id of Kimi's names; models leave its punctuation out or replace it."""
    stem, colon, number = identity.rpartition(":")
    name = (stem if colon and number.isdigit() else identity).removeprefix("functions.").strip()
    known = {tool.name for tool in tools}
    if name not in known and (match := _SANITIZED.fullmatch(identity)) and match[1] in known:
        return match[1]
    return name


def function_by_arguments(text: str, tools: tuple[Tool, ...]) -> tuple[str, str] | None:
    """The only function whose parameters fit some arguments, or the one they name; and the arguments."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    schemas = {tool.name: tool.parameters or {} for tool in tools}
    named = found.get("name")
    if isinstance(named, str) and named in schemas and "name" not in (schemas[named].get("properties") or {}):
        arguments = {key: value for key, value in found.items() if key != "name"}
        return named, json.dumps(arguments, ensure_ascii=False)
    fitting = [
        name
        for name, schema in schemas.items()
        if set(schema.get("required") or ()) <= set(found) <= set(schema.get("properties") or ())
    ]
    return (fitting[0], text) if len(fitting) == 1 else None


class DelimitedCalls(Machine):
    """Parses the calls described above.

    native_ids: the head is the call's id, as in Kimi's format. tokens: the marks known to be special tokens,
    which end a call even within a string; the others may be part of the string. The tag that closes the
    reasoning ends a call as well, but not within a string. tools: to find the function of an id that does not
    name it as it should.
    """

    def __init__(
        self,
        marks: Marks,
        native_ids: bool = False,
        tokens: frozenset[str] = frozenset(),
        tools: tuple[Tool, ...] = (),
    ) -> None:
        super().__init__()
        self._tools = tools
        self._tokens = tokens - {THINK.close}
        self._marks, self._native_ids = marks, native_ids
        own = marks.all | set(marks.misspelled)
        self._own, self._literals = literals(own), literals(own | {THINK.close})
        self._state = self._outside
        self._trailing = Trailing()
        self._ids: set[str] = set()
        self._pieces: list[str] = []  # arguments that are no JSON object, until the call ends
        self._object: JsonObject | None = None
        self._call: tuple[str, str | None] = "", None  # its name and id
        self._nameless = False  # its id does not tell the function
        self._sent = False  # any of this call's arguments
        self._fenced = False  # this call's arguments are in a code block

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._state not in (self._outside, self._between)

    def finish(self) -> list[Delta]:
        """Flush what was held back. A call truncated by the token limit keeps the arguments it has."""
        rest, self._buffer = self._buffer, ""
        if self._state != self._json or self._object is None or not self._object.quoted:
            within = self._state in (self._between, self._closed) and self._own.cut(rest)
            rest = "" if within else self._own.unless_cut(rest)
        if self._state in (self._outside, self._between):
            self._text(self._trailing.take() + rest)
        elif self._state == self._head:
            self._headless(rest.strip())
        elif self._state == self._raw:
            self._end_raw("".join((*self._pieces, rest)).strip())
        elif self._state == self._json:
            self._arguments(rest)
        elif self._state == self._closed:
            self._after(rest)
        return self._taken()

    # States. Each ends at a mark, whose meaning depends only on the state.

    def _outside(self) -> bool:
        return self._until_mark(lambda text: self._text(self._trailing.push(text)))

    def _between(self) -> bool:
        """After a mark of the section: white space is dropped, other text belongs to the answer."""
        self._buffer = self._buffer.lstrip()
        if self._buffer and not self._starts_mark():
            self._state = self._outside
        return self._until_mark(lambda _: None) if self._state == self._between else True

    def _head(self) -> bool:
        found = self._literals.find(self._buffer)
        if found is None and self._literals.ready(self._buffer) <= MAX_HEAD:
            return False
        if found is None or found[0] > MAX_HEAD:
            self._state = self._outside  # too long for a head: the rest is text
            return True
        head = self._take(found[0]).strip()
        if self._buffer.startswith(self._marks.separator):
            self._take(len(self._marks.separator))
            if head == "function":
                self._state = self._name
            else:
                self._named(head)
        elif head and not re.search(r"\s", head) and self._buffer.startswith(self._marks.call_end):
            self._named(head)  # without arguments
        else:  # the model deviated from its format
            self._headless(head)
        return True

    def _name(self) -> bool:
        """V3 and R1: the name is the line after the separator."""
        self._buffer = self._buffer.lstrip()
        found, line = self._literals.find(self._buffer), self._buffer.find("\n")
        ends = [at for at in (line, found[0] if found else -1) if at >= 0]
        if not ends and self._literals.ready(self._buffer) <= MAX_HEAD:
            return False
        if not ends or min(ends) > MAX_HEAD or self._buffer[0] in "`{":
            self._state = self._outside  # arguments without a name, or too long for one
        else:
            self._named(self._take(min(ends)).strip())
        return True

    def _before(self) -> bool:
        """Before the arguments: white space and an opening fence."""
        self._buffer = self._buffer.lstrip()
        fence = None if self._fenced else _FENCE.match(self._buffer)
        if fence is not None:
            if fence.end() == len(self._buffer):
                return False
            self._take(fence.end())
            self._fenced = True
        elif self._buffer:
            streams = self._buffer.startswith("{") and not self._nameless
            self._object = JsonObject() if streams else None
            self._state = self._json if self._object else self._raw
        return True

    def _json(self) -> bool:
        """An object, streamed as it is written."""
        return self._until_mark(self._push_json)

    def _closed(self) -> bool:
        """After the object."""
        return self._until_mark(self._after)

    def _raw(self) -> bool:
        return self._until_mark(self._pieces.append)

    # Shared by the states.

    def _named(self, head: str) -> None:
        identity, name = None, head
        self._nameless = False
        if self._native_ids:
            identity = head if head not in self._ids else new_call_id()
            self._ids.add(identity)
            name = function_of(head, self._tools)
            known = any(name == tool.name for tool in self._tools)
            self._nameless = not known and _NAMELESS.fullmatch(head) is not None
        if not name:
            self._state = self._outside
            return
        self._call = name, identity
        self._pieces, self._object, self._sent, self._fenced = [], None, False, False
        self._state = self._before
        if not self._nameless:
            self._begin(*self._call)

    def _headless(self, head: str) -> None:
        """Not a call. A single word can only be the beginning of one; anything else is text."""
        self._state = self._outside
        if re.search(r"\s", head):
            self._text(self._trailing.push(head))

    def _push_json(self, text: str) -> None:
        assert self._object is not None
        end = self._object.push(text)
        self._arguments(text if end < 0 else text[:end])
        self._sent = True
        if end >= 0:
            self._object, self._state = None, self._closed
            self._after(text[end:])

    def _after(self, text: str) -> None:
        """Text between the object and the call's end is part of the answer."""
        if text := text.lstrip(_AFTER):
            self._state = self._outside
            self._text(self._trailing.push(text))

    def _end_arguments(self) -> None:
        if not self._sent:
            text = "".join(self._pieces).strip().removesuffix("```").rstrip()
            self._end_raw(text or "{}")
            self._sent = True

    def _end_raw(self, text: str) -> None:
        if self._nameless:
            name, text = function_by_arguments(text, self._tools) or (self._call[0], text)
            self._begin(name, self._call[1])
        self._arguments(text)

    def _starts_mark(self) -> bool:
        found = self._literals.find(self._buffer)
        return found[0] == 0 if found else self._literals.ready(self._buffer) == 0

    def _until_mark(self, take: Callable[[str], object]) -> bool:
        """Pass the text before the next mark to `take`, then handle the mark."""
        found = self._literals.find(self._buffer)
        if found is None:
            ready = self._literals.ready(self._buffer)
            if ready:
                take(self._take(ready))
            return False
        start, end = found
        if start:
            take(self._take(start))
        mark = self._take(end - start)
        if self._object is not None and self._object.quoted and mark not in self._tokens:
            take(mark)
        else:
            self._mark(mark)
        return True

    def _mark(self, mark: str) -> None:
        if self._state in (self._before, self._json, self._raw, self._closed):
            self._end_arguments()
            self._object = None
        elif mark != THINK.close:
            self._trailing.take()  # white space before a call
        if mark == THINK.close:
            self._state = self._outside
            self._text(self._trailing.push(mark))
        else:
            self._state = self._head if mark == self._marks.call_begin else self._between
