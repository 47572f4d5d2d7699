"""Passes a call's arguments on as they arrive, so that what was passed on is a JSON object at the end.

For clients whose calls hold an object instead of text.
"""

from __future__ import annotations

import json
import math
import re

RAW = "_raw"  # the member with the model's text, if that is no JSON object
_SPACE = " \t\r\n"
_KEY_TEXT = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*'
_KEY = re.compile(_KEY_TEXT + '"')
_CUT_KEY = re.compile(_KEY_TEXT + r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD = re.compile(r"[-+.\w]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_CLOSERS = {"{": "}", "[": "]"}
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
        self._rest = ""  # not yet checked
        self._held = ""  # a comma and a key, until their value begins
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
            self._rest += text
            while self._rest and not self._broken and self._step():
                pass
        return self._taken()

    def close(self) -> str:
        """The end of the object; empty if there was no text."""
        if not self._broken and self._expect.startswith("value") and _is_scalar(self._rest):
            self._value(self._rest)
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

    def _taken(self) -> str:
        text, self._out = "".join(self._out), []
        return text

    def _step(self) -> bool:
        """Check the next token; False if more text is needed."""
        if self._quoted:
            return self._string()
        char, expect = self._rest[0], self._expect
        if char in _SPACE:
            body = self._rest.lstrip(_SPACE)
            self._pass(self._rest[: len(self._rest) - len(body)])
            self._rest = body
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
        if self._expect == "key or end" and self._rest[0] == "}":
            self._close_bracket("}")
        elif match := _KEY.match(self._rest):
            self._held += match[0]
            self._rest = self._rest[match.end() :]
            self._expect = "colon"
        elif _CUT_KEY.fullmatch(self._rest):
            return False
        else:
            self._break()
        return True

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._rest = self._rest[1:]
            self._value('"')
            self._quoted = True
        elif char in _CLOSERS:
            self._open(char)
        elif char == "]" and self._expect == "value or end":
            self._close_bracket(char)
        elif (match := _WORD.match(self._rest)) is None:
            self._break()
        elif match.end() == len(self._rest):
            return False
        elif _is_scalar(match[0]):
            self._rest = self._rest[match.end() :]
            self._value(match[0])
        else:
            self._break()
        return True

    def _string(self) -> bool:
        if match := _PLAIN.match(self._rest) or _ESCAPE.match(self._rest):
            self._out.append(match[0])
            self._rest = self._rest[match.end() :]
        elif self._rest[0] == '"':
            self._out.append('"')
            self._rest, self._quoted = self._rest[1:], False
        elif self._rest[0] != "\\":
            self._out.append(json.dumps(self._rest[0])[1:-1])
            self._rest = self._rest[1:]
        elif _CUT_ESCAPE.fullmatch(self._rest):
            return False
        else:
            self._break()
        return True

    # What the text is made of.

    def _pass(self, text: str) -> None:
        if self._held:
            self._held += text
        else:
            self._out.append(text)

    def _value(self, text: str) -> None:
        """A value, or its beginning: what was held back before it becomes part of the object."""
        self._members = self._members or len(self._stack) == 1
        self._out += (self._held, text)
        self._held, self._expect = "", "comma"

    def _open(self, bracket: str) -> None:
        if len(self._stack) == _MAX_DEPTH:
            self._break()
            return
        self._rest = self._rest[1:]
        self._value(bracket)
        if not self._stack:
            self._members = False
        self._stack += bracket
        self._expect = "key or end" if bracket == "{" else "value or end"

    def _punctuation(self, mark: str, then: str) -> None:
        if self._rest[0] != mark:
            self._break()
            return
        self._held += mark
        self._rest, self._expect = self._rest[1:], then

    def _close_bracket(self, char: str) -> None:
        """The last one is passed on by `close`, as there may be more text."""
        if char != _CLOSERS[self._stack[-1]]:
            self._break()
            return
        self._rest = self._rest[1:]
        if len(self._stack) == 1:
            self._expect = "end"
            return
        self._out.append(char)
        self._stack, self._expect = self._stack[:-1], "comma"

    def _break(self) -> None:
        self._broken, self._rest = True, ""


def as_object(text: str) -> str:
    """A whole text as a JSON object; empty if there is no text."""
    writer = ObjectText()
    return writer.push(text) + writer.close()
