"""Tells a special token from the same text spelled by other tokens.

Text does not say which of its tokens are special: a model that quotes `<｜tool▁call▁end｜>` letter by letter
does not end a call. So the detokenizer puts MARK before the text of each token that is markup, and parsers
read the text through `SpecialTokens`.
"""

from __future__ import annotations

from farthing.conversation.scan import literals

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
