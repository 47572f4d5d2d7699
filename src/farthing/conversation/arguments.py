"""The arguments of a tool call: typed by the tool's schema, passed on as they arrive, repaired if cut off."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from farthing.conversation.scan import MARK

# Converts parameter values from text to JSON. The tool's schema decides if the text is ambiguous.

Kinds = frozenset[str] | None  # JSON types a schema accepts; None: not known

MAX_REFERENCES = 8  # of references and unions in a schema
_MAX_STEPS = 64  # of a reference
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Budget:
    """How many parts of schemas are looked at: references let a small schema stand for a very large one."""

    def __init__(self, parts: int) -> None:
        self._most = self._left = parts

    def spend(self, parts: int = 1) -> None:
        """Raises ValueError once there were too many."""
        self._left -= parts
        if self._left < 0:
            raise ValueError(
                f"tools: their schemas, with what they refer to, have more than {self._most} parts; expected "
                "fewer"
            )


_BUDGET = 1024  # of one parameter of an answer


def kinds_of(parameters: Mapping[str, Any] | None, name: str, budget: Budget | None = None) -> Kinds:
    """The JSON types that a function's schema accepts for a parameter. Raises ValueError if that takes more
    than the budget; without one they are then not known."""
    properties = (parameters or {}).get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    try:
        return _kinds(schema, parameters or {}, MAX_REFERENCES, budget or Budget(_BUDGET))
    except ValueError:
        if budget is not None:
            raise
        return None


def _kinds(schema: Any, root: Mapping[str, Any], depth: int, budget: Budget) -> Kinds:
    budget.spend()
    if not isinstance(schema, Mapping) or not depth:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return _kinds(resolved(root, reference), root, depth - 1, budget)
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str)) or None
    if "const" in schema:
        return frozenset({_kind(schema["const"])})
    if isinstance(values := schema.get("enum"), list) and values:
        budget.spend(len(values))
        return frozenset(map(_kind, values))
    for union in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(union), list) and branches:
            found = [_kinds(branch, root, depth - 1, budget) for branch in branches]
            return None if None in found else frozenset().union(*(kinds for kinds in found if kinds))
    if isinstance(parts := schema.get("allOf"), list):
        return next((kinds for part in parts if (kinds := _kinds(part, root, depth - 1, budget))), None)
    return None


def resolved(root: Mapping[str, Any], reference: str) -> Any:
    """What a reference within a schema refers to; None if there is no such part, or it is too far away."""
    if not reference.startswith("#") or reference.count("/") > _MAX_STEPS:
        return None
    node: Any = root
    for step in reference[1:].split("/")[1:]:
        node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def is_text(declared: bool | None, kinds: Kinds) -> bool:
    """Whether a value is a string whatever it contains, so that it can be streamed as it arrives.

    declared: what the format says (True: a string, False: JSON); None: it says nothing.
    """
    if declared:
        return kinds is None or "string" in kinds
    return declared is None and kinds == frozenset({"string"})


def to_json(text: str, declared: bool | None, kinds: Kinds) -> str:
    """A complete value as JSON text."""
    if is_text(declared, kinds):
        return quoted(text)
    value = _json(text)
    if value is None:
        return quoted(text)
    kind = _kind(json.loads(value))
    fits = kinds is None or kind in kinds or (kind == "integer" and "number" in kinds)
    if fits:
        return value
    if kind == "number" and kinds is not None and "integer" in kinds and float(value).is_integer():
        return str(int(float(value)))
    if declared or (kinds is not None and "string" in kinds):
        return quoted(text)
    return value


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _json(text: str) -> str | None:
    """The JSON text of a value, or None if it is not JSON. Python's True, False and None are understood."""
    text = text.strip()
    text = _PYTHON.get(text, text)
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return text


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


# Passes a call's arguments on as they arrive, so that what was passed on is a JSON object at the end.
#
# For clients whose calls hold an object instead of text.

RAW = "_raw"  # the member with the model's text, if that is no JSON object
_SPACES = re.compile(r"[ \t\r\n]+")
_KEY_TEXT = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*'
_KEY = re.compile(_KEY_TEXT + '"')
_CUT_KEY = re.compile(_KEY_TEXT + r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD = re.compile(r"[-+.\w]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_CLOSERS = {"{": "}", "[": "]"}
_LONGEST = 4096  # characters of a key or a word that is not complete
_MAX_DEPTH = 100  # clients send the object back within a body, whose depth is limited, too


def _is_scalar(text: str) -> bool:
    """Whether a text is a JSON word or number. Numbers beyond a double are none: clients read infinities."""
    if _SCALAR.fullmatch(text) is None:
        return False
    return text in ("true", "false", "null") or math.isfinite(float(text))


class ObjectText:
    """Checks text while it arrives, and holds back what may not become a member.

    From the first character that is no JSON, nothing more is passed on, and the object ends with the member
    `_raw`, the whole text. An object that was cut is closed after its last whole value; a string keeps its
    beginning. Control characters in strings are escaped.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []  # all text
        self._rest, self._at = "", 0  # the text from `_at` on is not yet checked
        self._held: list[str] = []  # a comma and a key, until their value begins
        self._out: list[str] = []
        self._stack = ""  # the open brackets
        self._expect = "object"
        self._quoted = False  # inside a string that is a value
        self._members = False  # the outer object has a member
        self._broken = False

    def push(self, text: str) -> str:
        """Take the next piece; returns the text to pass on."""
        self._pieces.append(text)
        if not self._broken:
            self._rest, self._at = self._rest[self._at :] + text, 0
            while self._at < len(self._rest) and not self._broken and self._step():
                pass
        return self._taken()

    def close(self) -> str:
        """The end of the object; empty if there was no text."""
        rest = self._rest[self._at :]
        if not self._broken and self._expect.startswith("value") and _is_scalar(rest):
            self._value(rest)
        if not self._broken and self._expect == "object":
            return ""
        if not self._stack:
            self._out.append("{")
            self._stack = "{"
        self._out.append('"' if self._quoted else "")
        self._out += (_CLOSERS[bracket] for bracket in reversed(self._stack[1:]))
        if self._broken:
            raw = json.dumps("".join(self._pieces), ensure_ascii=False)
            self._out.append(f'{"," if self._members else ""}"{RAW}":{raw}')
        self._out.append("}")
        return self._taken()

    @property
    def _is_short(self) -> bool:
        """Whether a key or a word without its end may go on: it is read again with every piece."""
        return len(self._rest) - self._at <= _LONGEST

    def _taken(self) -> str:
        text, self._out = "".join(self._out), []
        return text

    def _step(self) -> bool:
        """Check the next token; False if more text is needed."""
        if self._quoted:
            return self._string()
        char, expect = self._rest[self._at], self._expect
        if (space := _SPACES.match(self._rest, self._at)) is not None:
            self._pass(space[0])
            self._at = space.end()
        elif expect == "object":
            self._open("{") if char == "{" else self._break()
        elif expect.startswith("key"):
            return self._key()
        elif expect == "colon":
            self._punctuation(":", "value")
        elif expect.startswith("value"):
            return self._begin_value(char)
        elif expect == "end":
            self._break()
        elif char == ",":
            self._punctuation(",", "key" if self._stack[-1] == "{" else "value")
        else:
            self._close_bracket(char)
        return True

    def _key(self) -> bool:
        if self._expect == "key or end" and self._rest[self._at] == "}":
            self._close_bracket("}")
        elif match := _KEY.match(self._rest, self._at):
            self._held.append(match[0])
            self._at = match.end()
            self._expect = "colon"
        elif self._is_short and _CUT_KEY.fullmatch(self._rest, self._at):
            return False
        else:
            self._break()
        return True

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._at += 1
            self._value('"')
            self._quoted = True
        elif char in _CLOSERS:
            self._open(char)
        elif char == "]" and self._expect == "value or end":
            self._close_bracket(char)
        elif (match := _WORD.match(self._rest, self._at)) is None:
            self._break()
        elif match.end() == len(self._rest) and self._is_short:
            return False
        elif _is_scalar(match[0]):
            self._at = match.end()
            self._value(match[0])
        else:
            self._break()
        return True

    def _string(self) -> bool:
        char = self._rest[self._at]
        if match := _PLAIN.match(self._rest, self._at) or _ESCAPE.match(self._rest, self._at):
            self._out.append(match[0])
            self._at = match.end()
        elif char == '"':
            self._out.append('"')
            self._at, self._quoted = self._at + 1, False
        elif char != "\\":
            self._out.append(json.dumps(char)[1:-1])
            self._at += 1
        elif _CUT_ESCAPE.fullmatch(self._rest, self._at):
            return False
        else:
            self._break()
        return True

    # What the text is made of.

    def _pass(self, text: str) -> None:
        (self._held or self._out).append(text)

    def _value(self, text: str) -> None:
        """A value, or its beginning: what was held back before it becomes part of the object."""
        self._members = self._members or len(self._stack) == 1
        self._out += (*self._held, text)
        self._held, self._expect = [], "comma"

    def _open(self, bracket: str) -> None:
        if len(self._stack) == _MAX_DEPTH:
            self._break()
            return
        self._at += 1
        self._value(bracket)
        if not self._stack:
            self._members = False
        self._stack += bracket
        self._expect = "key or end" if bracket == "{" else "value or end"

    def _punctuation(self, mark: str, then: str) -> None:
        if self._rest[self._at] != mark:
            self._break()
            return
        self._held.append(mark)
        self._at, self._expect = self._at + 1, then

    def _close_bracket(self, char: str) -> None:
        """The last one is passed on by `close`, as there may be more text."""
        if char != _CLOSERS[self._stack[-1]]:
            self._break()
            return
        self._at += 1
        if len(self._stack) == 1:
            self._expect = "end"
            return
        self._out.append(char)
        self._stack, self._expect = self._stack[:-1], "comma"

    def _break(self) -> None:
        self._broken, self._rest, self._at = True, "", 0


def as_object(text: str) -> str:
    """A whole text as a JSON object; empty if there is no text."""
    writer = ObjectText()
    return writer.push(text) + writer.close()


_MARK = re.compile(r'["\\{}\[\],]')
_SENTINEL = f"\ue000{secrets.token_hex(16)}\ue000"  # a mark, while escapes may stand for the same character
_ESCAPE_AT_THE_END = re.compile(r"\\(u[0-9a-fA-F]{0,3})?")


def object_of(arguments: Any) -> dict[str, Any]:
    """A call's arguments as an object; of a text that was cut, what it has. Anything else becomes the only
    value of an object, because a model that wrote an invalid call must be able to read it and try again."""
    if not arguments or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    found = parsed(arguments) if isinstance(arguments, str) else arguments
    return dict(found) if isinstance(found, Mapping) else {"arguments": arguments}


def parsed(text: str) -> dict[str, Any] | None:
    """The object that a text is, or is the beginning of; None if it is neither.

    In a text that was cut, the last string keeps its beginning; a key or a word that was cut is dropped.
    """
    for attempt in _attempts(text):
        try:
            escapes = "\\u" in attempt
            value = json.loads(attempt.replace(MARK, _SENTINEL) if escapes else attempt)
            if escapes:  # escapes may leave half of a surrogate pair, which has no encoding
                written = _well_formed(json.dumps(value, ensure_ascii=False))
                value = json.loads(written.replace(_SENTINEL, MARK))
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _well_formed(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _attempts(text: str) -> Iterator[str]:
    """The text; with its last string and all brackets closed; the same after its last whole member."""
    yield text
    closers: list[str] = []
    quoted, escape = False, -2  # whether inside a string, and where its last escape begins
    whole = 0
    closed: list[str] = []  # brackets since then
    for match in _MARK.finditer(text):
        at, mark = match.start(), match[0]
        if at == escape + 1:
            continue
        if quoted:
            if mark == "\\":
                escape = at
            quoted = mark != '"'
        elif mark == '"':
            quoted = True
        elif mark == ",":
            whole, closed = at, []
        elif mark in _CLOSERS:
            closers.append(_CLOSERS[mark])
            whole, closed = at + 1, []
        elif closers:
            closed.append(closers.pop())
    if not closers:
        return  # nothing is missing
    end = escape if escape >= 0 and _ESCAPE_AT_THE_END.fullmatch(text, escape) else len(text)
    missing = "".join(reversed(closers))
    yield (text[:end] + '"' if quoted else text) + missing
    yield text[:whole] + "".join(closed) + missing
