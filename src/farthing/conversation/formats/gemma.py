"""Gemma 3's turns, and the answers of Gemma 4: thoughts in a channel, and calls in a notation of their own.

    <|channel>thought
    REASONING
    <channel|>ANSWER<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>,KEY:[1,true,{KEY:2.5}]}<tool_call|>

Keys and numbers are bare, and a token quotes texts, in which nothing is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from farthing.conversation.arguments import resolved
from farthing.conversation.base import (
    MAX_HEAD,
    CallFormat,
    ChatFormat,
    ControlTokens,
    FormatError,
    Machine,
    Tags,
)
from farthing.conversation.forced import arguments_schema
from farthing.conversation.scan import Trailing, literals
from farthing.conversation.strict import ANY_OBJECT, Lark, Parameter, Section, text_value
from farthing.conversation.types import Conversation, Delta, Reasoning, Tool

CHANNEL, CHANNEL_END, CALL, CALL_END = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"
QUOTE, RESULT = '<|"|>', "<|tool_response>"
MARKS = frozenset((CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, RESULT))
_THOUGHT, _CALLED = "thought", "call:"
_NAME = re.compile(r'[^\s{}"<>()]+')
_WORDS = {"None": "null", "True": "true", "False": "false"}  # as templates in Python print them
_PUNCTUATION = re.compile(r"[{}\[\],:]")


class Notation:
    """Rewrites the arguments of a call as JSON, piece by piece."""

    def __init__(self) -> None:
        self._open: list[str] = []  # objects and arrays that have not ended
        self._key = False  # a key comes next
        self._word = ""  # bare text, or a key
        self._quoted = False
        self._exact = False  # the key was quoted
        self.begun = self.ended = False

    def quote(self) -> str:
        """The mark around a text."""
        self._quoted = not self._quoted
        self._exact = self._exact or self._key
        if self._key or self.ended:
            return ""
        self._word = ""
        return '"'

    def push(self, text: str) -> str:
        """JSON of which all that came before is the beginning."""
        if self.ended:
            return ""
        if self._quoted:
            if self._key:
                self._word += text
                return ""
            return json.dumps(text, ensure_ascii=False)[1:-1]
        out, at = [], 0
        for match in _PUNCTUATION.finditer(text):
            self._word += text[at : match.start()]
            at = match.end()
            if self._key and match[0] in ",[":  # part of a bare key
                self._word += match[0]
                continue
            out.append(self._mark(match[0]))
            if self.ended:
                return "".join(out)
        self._word += text[at:]
        return "".join(out)

    def _mark(self, mark: str) -> str:
        if mark == ":" and not self._key:
            self._word += mark
            return ""
        word = self._bare()
        if mark == ":":
            self._key = False
            return f"{word}: "
        if mark in "{[":
            self._open.append(mark)
            self.begun = True
        elif mark in "}]" and self._open:
            mark = "}" if self._open.pop() == "{" else "]"
            self.ended = not self._open
        self._key = mark in "{," and self._open[-1:] == ["{"]
        return word + mark

    def _bare(self) -> str:
        """The word that ended, as JSON."""
        word, exact = self._word if self._exact else self._word.strip(), self._exact
        self._word, self._exact = "", False
        if self._key:
            return json.dumps(word, ensure_ascii=False) if word or exact else ""
        word = _WORDS.get(word, word)
        try:
            json.loads(word or "null")
        except ValueError:
            return json.dumps(word, ensure_ascii=False)
        return word


class GemmaCalls(Machine):
    """Parses an answer: the channel `thought` is reasoning, and all else but calls is text."""

    def __init__(self, tools: tuple[Tool, ...], tokens: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._literals = literals(MARKS)
        self._known = {tool.name for tool in tools}
        self._state = self._body
        self._thinks = False  # the text is reasoning
        self._head = ""  # of a channel, or the name of a call
        self._blank = False  # white space comes after a channel or call
        self._trailing = Trailing()
        self._call = Notation()

    @property
    def inside(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._state == self._arguments_of

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return self._state == self._body and self._thinks

    def finish(self) -> list[Delta]:
        """Flush what was held back. A call that was cut off keeps the arguments it has."""
        if self._state == self._body:
            rest = self._literals.unless_cut(self._buffer)
            marked = self._blank and self._literals.cut(rest)  # another mark follows at once
            self._send("" if marked else rest)
        elif self._state == self._arguments_of and not self._literals.cut(self._buffer):
            self._arguments(self._call.push(self._buffer))
        self._buffer = ""
        return self._taken()

    # States.

    def _until_mark(self) -> tuple[str, str | None]:
        """The text up to the next mark, and the mark; None: it has not come."""
        found = self._literals.find(self._buffer)
        text = self._take(found[0] if found else self._literals.ready(self._buffer))
        return text, self._take(found[1] - found[0]) if found else None

    def _body(self) -> bool:
        text, mark = self._until_mark()
        self._send(text)
        if mark in (CHANNEL, CALL):
            self._trailing.take()
            self._thinks, self._head = False, ""
            self._state = self._channel if mark == CHANNEL else self._name
        elif mark == CHANNEL_END:
            self._trailing.take()
            self._thinks, self._blank = False, True
        return mark is not None

    def _channel(self) -> bool:
        """Its name, up to the end of a line."""
        text, mark = self._until_mark()
        room = MAX_HEAD + 1 - len(self._head)  # no name is so long: what follows is text, however it is cut
        line, newline, beyond = text[:room].partition("\n")
        rest = beyond + text[room:]
        self._head += line
        if newline or mark or len(self._head) > MAX_HEAD:
            self._thinks, self._blank = self._head.strip() == _THOUGHT, True
            self._buffer = rest + (mark or "") + self._buffer
            self._state = self._body
            return True
        return False

    def _name(self) -> bool:
        """The function's name, up to its arguments."""
        text, mark = self._until_mark()
        head, brace, rest = text.partition("{")
        self._head += head
        name = self._head.strip().removeprefix(_CALLED).strip()
        if not (brace or mark or len(self._head) > MAX_HEAD):
            return False
        self._buffer = brace + rest + (mark or "") + self._buffer
        named = len(self._head) <= MAX_HEAD and (name in self._known or _NAME.fullmatch(name))
        if named and (brace or mark == CALL_END):
            self._begin(name)
            self._call, self._state = Notation(), self._arguments_of
        else:  # the model wrote about calls
            self._state = self._body
            self._send(self._head)
        return True

    def _arguments_of(self) -> bool:
        text, mark = self._until_mark()
        self._arguments(self._call.push(text))
        if mark == QUOTE:
            self._arguments(self._call.quote())
        elif mark is not None:
            if not self._call.begun:
                self._arguments("{}")
            self._blank, self._state = True, self._body
            self._buffer = self._buffer if mark == CALL_END else mark + self._buffer
        return mark is not None

    # Shared by the states.

    def _send(self, text: str) -> None:
        if self._blank:
            text = text.lstrip()
        if not text:
            return
        self._blank = False
        if self._thinks:
            if ready := self._trailing.push(text):
                self._out.append(Reasoning(ready))
        else:
            self._text(text)


class NotationCalls:
    """The grammar of calls. Members are sorted whatever their case, as in the published template."""

    openers = (CALL,)
    marks = MARKS
    section = Section("", "", "")

    def calls(self, tools: list[Tool], lark: Lark) -> str:
        """See Syntax."""
        return lark.either(self.call(tool, lark) for tool in tools)

    def call(self, tool: Tool, lark: Lark) -> str:
        """See Syntax."""
        schema = arguments_schema(tool) if tool.strict else ANY_OBJECT
        try:
            body = _Values(tool.name, schema, lark).value(schema)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"tools: {tool.name!r} has a damaged schema; expected JSON Schema") from error
        return f"{lark.text(_CALLED + tool.name)} {body} {lark.text(CALL_END)}"


_NOTES = {"title", "description", "$schema", "$id", "examples", "default", "$comment", "$defs", "definitions"}
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_OF_KIND = {
    "string": {"pattern", "format", "minLength", "maxLength"},
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": set[str](),
    "null": set[str](),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "maxProperties"},
}
_UNIONS = ("anyOf", "oneOf")
_BROKEN_KEY = re.compile(r"^$|^\s|[{}:<\n]|\s$")


class _Values:
    """Expressions for the values that a tool's schema accepts. All methods raise ValueError."""

    def __init__(self, tool: str, root: Mapping[str, Any], lark: Lark) -> None:
        self._tool, self._root, self._lark = tool, root, lark

    def value(self, schema: Any, name: str = "") -> str:
        """name: the member that it belongs to."""
        key = json.dumps([self._tool, schema], sort_keys=True)
        return self._lark.rule(key, lambda: self._value(schema, name))

    def _value(self, schema: Any, name: str) -> str:
        if schema is True:
            schema = {}
        if "$ref" in (schema or ()) and len(schema) > 1:  # what it refers to is written once
            return self.value({"$ref": schema["$ref"]}, name)
        found = resolved(self._root, schema["$ref"]) if "$ref" in (schema or ()) else schema
        if not isinstance(found, Mapping):
            raise self._error(name, "what no value fits")
        if found is not schema:
            return self.value(found, name)
        limits = set(schema) - _NOTES
        if values := [schema["const"]] if "const" in schema else schema.get("enum"):
            return self._lark.either(self._lark.text(self._written(value, name)) for value in values)
        union = next((key for key in (*_UNIONS, "allOf") if key in schema), None)
        if union is not None:
            if limits - {union, "type"} or (union == "allOf" and len(schema[union]) > 1):
                raise self._error(name, ", ".join(sorted(limits)))
            return self._lark.either(self.value(member, name) for member in schema[union])
        given = schema.get("type", next((k for k, own in _OF_KIND.items() if own & limits), list(_OF_KIND)))
        kinds = [given] if isinstance(given, str) else given
        if wrong := [k for k in kinds if k not in _OF_KIND]:
            raise self._error(name, f"type {wrong[0]!r}")
        if unknown := limits - {"type"}.union(*(_OF_KIND[kind] for kind in kinds)):
            raise self._error(name, ", ".join(sorted(unknown)))
        return self._lark.either(self._of_kind(kind, schema, name) for kind in kinds)

    def _of_kind(self, kind: str, schema: Mapping[str, Any], name: str) -> str:
        own = {key: schema[key] for key in _OF_KIND[kind] if key in schema}
        match kind:
            case "string":
                text = Parameter(self._tool, name, {"type": kind, **own}, self._root, True, self._lark.budget)
                return f"{self._lark.text(QUOTE)} {text_value(text, QUOTE, self._lark)}"
            case "array":
                return self._enclosed("[", self._items(schema, name), "]")
            case "object":
                return self._enclosed("{", self._members(schema, name), "}")
            case "null":
                return self._lark.text("null")
            case _:
                return self._lark.json({"type": kind, **own})

    def _enclosed(self, begin: str, inner: str, end: str) -> str:
        return f"{self._lark.text(begin)} {inner} {self._lark.text(end)}"

    def _items(self, schema: Mapping[str, Any], name: str) -> str:
        item = self.value(schema.get("items", {}), name)
        return self._several(item, schema.get("minItems", 0), schema.get("maxItems"))

    def _several(self, item: str, least: int, most: int | None) -> str:
        if most == 0:
            return ""
        later = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        some = f"{item} ({self._lark.text(',')} {item}){{{later}}}"
        return some if least else f"({some})?"

    def _members(self, schema: Mapping[str, Any], name: str) -> str:
        """Declared members, each of which may follow any other before it; without any, free ones."""
        declared, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(declared, Mapping) or not all(isinstance(key, str) for key in required):
            raise TypeError("properties, required")
        more, comma = schema.get("additionalProperties", not declared), self._lark.text(",")
        members = {**{key: more or {} for key in required}, **declared}
        if not members:
            key = self._lark.regex(r"[^\s{}\[\],:<>\x22]{1,64}")
            member = f"{key} {self._lark.text(':')} {self.value(more, name)}" if more is not False else ""
            return self._several(member, 0, schema.get("maxProperties") if member else 0)
        needed = set(required)
        first = after = ""  # what follows if no member has been written, or if one has
        for key in sorted(members, key=str.lower, reverse=True):
            if _BROKEN_KEY.search(key):
                raise self._error(name, f"the name {key!r}")
            member = f"{self._lark.text(key + ':')} {self.value(members[key], key)} {after}"
            if key in needed:
                first, later = member, f"{comma} {member}"
            else:
                first = self._lark.either((member, first)) if first else f"({member})?"
                later = self._lark.either((f"{comma} {member}", after)) if after else f"({comma} {member})?"
            after = self._shared(later)
            first = self._shared(first)
        return first

    def _shared(self, expression: str) -> str:
        return self._lark.rule(expression, lambda: expression)

    def _written(self, value: Any, name: str) -> str:
        if isinstance(value, Mapping):
            pairs = (f"{key}:{self._written(value[key], name)}" for key in sorted(value, key=str.lower))
            return f"{{{','.join(pairs)}}}"
        if isinstance(value, list):
            return f"[{','.join(self._written(item, name) for item in value)}]"
        if isinstance(value, str) and QUOTE in value:
            raise self._error(name, f"a text with {QUOTE}")
        return f"{QUOTE}{value}{QUOTE}" if isinstance(value, str) else json.dumps(value)

    def _error(self, name: str, how: str) -> ValueError:
        return ValueError(
            f"tools: {self._tool!r} is strict and limits {name or 'its parameters'!r} by {how}, which this "
            "model's chat format cannot express; expected types, enum, const, anyOf, pattern or bounds"
        )


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """Gemma 3's prompt: a system text begins the first turn, and roles alternate. Raises FormatError."""
    if conversation.offered:
        raise FormatError("Gemma 3 has no tools; expected a conversation without, or another chat template")
    turns = list(conversation.turns)
    first = turns.pop(0).text + "\n\n" if turns and turns[0].role in ("system", "developer") else ""
    parts = [tokens.bos]
    for place, turn in enumerate(turns):
        if turn.role != ("assistant" if place % 2 else "user") or turn.calls:
            raise FormatError("turns of Gemma 3 alternate between user and assistant, without calls")
        role = "model" if turn.role == "assistant" else "user"
        open_ended = conversation.resume and place + 1 == len(turns)
        parts.append(f"{_TURN}{role}\n{first}{turn.text.strip()}{'' if open_ended else _TURN_END}")
        parts.append("" if open_ended else "\n")
        first = ""
    if conversation.generate and not conversation.resume:
        parts.append(f"{_TURN}model\n")
    return "".join(parts)


_TURN, _TURN_END = "<start_of_turn>", "<end_of_turn>"
GEMMA3 = ChatFormat("gemma3", render, stops=(_TURN_END,))
_THOUGHTS = Tags(f"{CHANNEL}{_THOUGHT}\n", CHANNEL_END)
GEMMA4 = CallFormat("gemma4", GemmaCalls, MARKS, NotationCalls(), whole=True, within=_THOUGHTS)
