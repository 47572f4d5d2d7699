"""Reads a call's arguments, including those that were cut off when the model reached its token limit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from farthing.conversation.marks import MARK

_MARK = re.compile(r'["\\{}\[\],]')
_CUT_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,3})?")
_CLOSERS = {"{": "}", "[": "]"}


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
            value = json.loads(attempt)
            if "\\u" in attempt:  # escapes may leave half of a surrogate pair, which has no encoding
                written = json.dumps(value, ensure_ascii=False)
                parts = written.split(MARK) if MARK in attempt else [written]
                value = json.loads(MARK.join(map(_well_formed, parts)))
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
    whole, after = 0, ""
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
            whole, after = at, "".join(reversed(closers))
        elif mark in _CLOSERS:
            closers.append(_CLOSERS[mark])
            whole, after = at + 1, "".join(reversed(closers))
        elif closers:
            closers.pop()
    if not closers:
        return  # nothing is missing
    end = escape if escape >= 0 and _CUT_ESCAPE.fullmatch(text, escape) else len(text)
    closed = text[:end] + '"' if quoted else text
    yield closed + "".join(reversed(closers))
    yield text[:whole] + after
