"""Fixed strings and special tokens, found in text that arrives in pieces, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby, takewhile


def beginning(text: str, literal: str) -> int:
    """Where `text` ends with a proper beginning of `literal`, the longest; len(text) if it does not."""
    at = text.find(literal[0], max(0, len(text) - len(literal) + 1))
    while at >= 0 and not literal.startswith(text[at:]):
        at = text.find(literal[0], at + 1)
    return at if at >= 0 else len(text)


_CERTAIN = 6  # characters of a tag that no text ends with by chance, as in "<tool_"; or a full-width bar


def alternatives(literals: Iterable[str]) -> str:
    """A pattern of the longest of these non-empty strings, which tests no beginning twice."""
    parts = []
    for _, group in groupby(sorted(set(literals)), key=lambda literal: literal[0]):
        same = list(group)
        common = takewhile(lambda pair: pair[0] == pair[1], zip(same[0], same[-1], strict=False))
        start = "".join(character for character, _ in common)  # they are sorted
        rests = [literal[len(start) :] for literal in same if literal != start]
        optional = "?" if len(rests) < len(same) else ""
        parts.append(re.escape(start) + (f"(?:{alternatives(rests)}){optional}" if rests else ""))
    return "|".join(parts)


class Literals:
    """A fixed set of non-empty strings. `find` returns the first one, the longest where several begin."""

    def __init__(self, literals: Iterable[str]) -> None:
        ordered = sorted(set(literals), key=len, reverse=True)
        self._pattern = re.compile(alternatives(ordered))
        self._literals = tuple(ordered)

    def find(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the first literal that is complete, whatever follows `text`; else None."""
        match = self._pattern.search(text)
        if match is None or (match.end() == len(text) and self.cut(match[0])):
            return None
        return match.span()

    def cut(self, text: str) -> bool:
        """Whether a longer literal begins with this text."""
        return any(len(longer) > len(text) and longer.startswith(text) for longer in self._literals)

    def replace(self, function: Callable[[str], str], text: str) -> str:
        """A complete text with each literal replaced by the function of it."""
        return self._pattern.sub(lambda match: function(match[0]), text)

    def unless_cut(self, text: str) -> str:
        """The end of an output; empty if it is the beginning of a literal."""
        certain = len(text) >= _CERTAIN or "｜" in text
        return "" if certain and self.cut(text) else text

    def ready(self, text: str) -> int:
        """The number of leading characters that cannot become part of a literal."""
        return min(beginning(text, literal) for literal in self._literals)


@lru_cache(maxsize=64)
def literals(strings: frozenset[str]) -> Literals:
    """`Literals` of a set, compiled once."""
    return Literals(strings)


class Trailing:
    """Holds back trailing white space until it is known what follows."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """The text that can be passed on: up to its last character that is not white space."""
        body = text.rstrip()
        if not body:
            if text:
                self._held.append(text)
            return ""
        ready = "".join(self._held) + body
        self._held = [text[len(body) :]] if len(body) < len(text) else []
        return ready

    def take(self) -> str:
        """Return the white space held back and forget it."""
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


# Tells a special token from the same text spelled by other tokens.
#
# Text does not say which of its tokens are special: a model that quotes `<｜tool▁call▁end｜>` letter by
# letter does not end a call. So the detokenizer puts MARK before the text of each token that is markup,
# and parsers read the text through `SpecialTokens`.

MARK = "\ud800"  # half of a surrogate pair, which no decoded text contains


def marked(text: str, tokens: frozenset[str]) -> str:
    """A text whose longest possible parts are these special tokens, each after MARK."""
    return literals(tokens).replace(MARK.__add__, text) if tokens else text


def plain(text: str) -> str:
    """A text without marks."""
    return text.replace(MARK, "") if MARK in text else text


class SpecialTokens:
    """Removes MARK before special tokens and inserts it into spelled ones, which no parser then recognizes.

    The parser's output still has to go through `plain`.
    """

    def __init__(self, texts: frozenset[str]) -> None:
        """texts: of the special tokens, two characters or more each."""
        self._literals = literals(texts | {MARK + text for text in texts})
        self._buffer = ""

    def push(self, text: str) -> str:
        """The text that no later piece can change, for the parser."""
        self._buffer += text
        ready: list[str] = []
        while found := self._literals.find(self._buffer):
            ready += (self._buffer[: found[0]], _shown(self._buffer[found[0] : found[1]]))
            self._buffer = self._buffer[found[1] :]
        size = self._literals.ready(self._buffer)
        ready.append(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return "".join(ready)

    def finish(self) -> str:
        """The rest; a token's text that begins a longer one is now complete."""
        rest, self._buffer = self._literals.replace(_shown, self._buffer), ""
        return rest


def _shown(token: str) -> str:
    return token[1:] if token[0] == MARK else token[0] + MARK + token[1:]
