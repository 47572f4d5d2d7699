"""Builds a Lark grammar, as llguidance reads it, of texts that hold special tokens and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from farthing.conversation.forced import COMPACT, rebased

_SLASH = re.compile(r"(?<!\\)/")  # would end a regular expression
_ANY = r"(.|\n)"
_ROOT = "root"  # the name of a whole schema among the definitions of its part


class Lark:
    """Expressions are strings that can be put one after another.

    special: the id of a mark that the tokenizer knows as one special token, which no literal text matches.
    """

    def __init__(self, marks: Iterable[str], special: Callable[[str], int | None]) -> None:
        known = ((mark, special(mark)) for mark in sorted(marks, key=len, reverse=True))
        self._tokens = {mark: f"<[{token}]>" for mark, token in known if token is not None}
        self._split = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._rules: list[str] = []
        self._shared: dict[str, str] = {}  # definition -> name

    def text(self, literal: str) -> str:
        """A literal text; nothing for an empty one."""
        return " ".join(self._terminal(piece) for piece in self._pieces(literal))

    def until(self, tag: str) -> str:
        """Any text up to a tag, the tag included."""
        first, *rest = self._pieces(tag)
        if first in self._tokens:  # special tokens are no text: they end it
            head = f"{self.regex(f'{_ANY}+')}? {self._terminal(first)}"
        else:
            head = self._rule("text", f"/{_ANY}*{_escaped(first)}/", lazy=not rest)
        return " ".join((head, *map(self._terminal, rest)))

    def json(self, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> str:
        """JSON that fits a schema. root: the schema that references in it refer to, if that is another."""
        if root is not None and '"$ref"' in json.dumps(schema):
            refers = {"$defs": {_ROOT: rebased(root, f"#/$defs/{_ROOT}")}}
            schema = rebased(schema, f"#/$defs/{_ROOT}") | refers
        return self._rule("json", f"%json {json.dumps(dict(schema) | {'x-guidance': COMPACT})}")

    def regex(self, pattern: str) -> str:
        """Text that a regular expression matches as a whole."""
        pattern = _SLASH.sub(r"\/", pattern)
        return self._rule("text", f"/{pattern}/")

    @staticmethod
    def either(options: Iterable[str]) -> str:
        """One of several expressions."""
        return f"({' | '.join(options)})"

    def grammar(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join(("%llguidance {}", f"start: {start}", *self._rules, ""))

    def _rule(self, kind: str, definition: str, lazy: bool = False) -> str:
        key = f"{lazy} {definition}"
        if key not in self._shared:
            self._shared[key] = name = f"{kind}_{len(self._shared)}"
            self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {definition}")
        return self._shared[key]

    def _pieces(self, literal: str) -> list[str]:
        pieces, at = [], 0
        for match in self._split.finditer(literal):
            pieces += [literal[at : match.start()], match[0]]
            at = match.end()
        return [piece for piece in (*pieces, literal[at:]) if piece]

    def _terminal(self, piece: str) -> str:
        return self._tokens.get(piece) or json.dumps(piece, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/").replace("\n", "\\n")
