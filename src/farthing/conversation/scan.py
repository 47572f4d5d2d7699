"""Finding fixed strings in a text that arrives in pieces. All work is linear in the text's length."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


class Literals:
    """A fixed set of non-empty strings. `find` returns the first one, the longest where several begin."""

    def __init__(self, literals: Iterable[str]) -> None:
        ordered = sorted(set(literals), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)))
        self._reach = max(map(len, ordered)) - 1
        self._prefixes = frozenset(text[:size] for text in ordered for size in range(1, len(text)))
        self._starts = tuple({text[0] for text in ordered})

    def find(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the first literal that is complete, whatever follows `text`; else None."""
        match = self._pattern.search(text)
        if match is None or (match.end() == len(text) and match[0] in self._prefixes):
            return None  # a longer literal may still be on its way
        return match.span()

    def remove(self, text: str) -> str:
        """A complete text without the literals."""
        return self._pattern.sub("", text)

    def ready(self, text: str) -> int:
        """How many characters of a text without a literal cannot become part of one."""
        size = len(text)
        tail = max(0, size - self._reach)
        at = min((found for start in self._starts if (found := text.find(start, tail)) >= 0), default=size)
        while at < size and text[at:] not in self._prefixes:
            at += 1
        return at


@lru_cache(maxsize=64)
def literals(strings: frozenset[str]) -> Literals:
    """`Literals` of a set, compiled once."""
    return Literals(strings)


class Trailing:
    """Holds back white space at the end of a text until it is known what follows."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """The text that can be passed on: everything up to its last character that is no white space."""
        body = text.rstrip()
        if not body:
            if text:
                self._held.append(text)
            return ""
        ready = "".join(self._held) + body
        self._held = [text[len(body) :]] if len(body) < len(text) else []
        return ready

    def take(self) -> str:
        """The white space held back, which is then forgotten."""
        held, self._held = "".join(self._held), []
        return held


class JsonObject:
    """Finds the end of a JSON object or array whose characters arrive in pieces."""

    _MARK = re.compile(r'["\\{}\[\]]')

    def __init__(self) -> None:
        self._depth = 0
        self.quoted = False  # the next character belongs to a string
        self._escaped = False  # the last piece ended in a backslash

    def push(self, text: str) -> int:
        """The position just after the object's end, or -1 if it is not in this piece."""
        if not text:
            return -1
        escaped = 0 if self._escaped else -1  # the position of a character after a backslash
        for match in self._MARK.finditer(text):
            at, mark = match.start(), match[0]
            if at == escaped:
                continue
            if self.quoted:
                if mark == "\\":
                    escaped = at + 1
                self.quoted = mark != '"'
            elif mark == '"':
                self.quoted = True
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return match.end()
        self._escaped = escaped == len(text)
        return -1
