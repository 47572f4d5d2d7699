"""Splits a text into reasoning and answer by the tags around the reasoning, and counts its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from farthing.conversation.deltas import Delta, Reasoning, Text
from farthing.conversation.parse.base import Tags
from farthing.conversation.scan import Trailing, literals


class ReasoningSplitter:
    """Splits text into reasoning and answer, and drops the tags and the white space around them.

    Models write reasoning in three ways: with both tags, with the closing tag alone because the prompt ends
    with the opening one, or with no tag. They also repeat the prompt's tag, close twice, or reason again
    after a part of the answer.

    exact: the tags are special tokens here, so that each one is a tag. Otherwise a tag amid an answer's text
    is part of it, and only one before the text, or after a call, is a tag.
    """

    def __init__(self, tags: Tags, opened: bool, exact: bool = False) -> None:
        self._tags, self._opened, self._exact = tags, opened, exact
        self._both = literals(frozenset((tags.open, tags.close)))
        self._ends = self._both if exact else literals(frozenset((tags.close,)))
        self._buffer = ""
        # start: nothing but white space so far. edge: after a tag or a call.
        self._state: Literal["start", "reasoning", "edge", "content"] = "start"
        self._trailing = Trailing()
        self._begun = False  # some reasoning was sent
        self._blank: list[str] = []  # leading white space, kept if the output has no tags

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        return self._state == "reasoning" or (self._state == "start" and self._opened)

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        self._buffer += text
        found: list[Delta] = []
        steps = {"start": self._edge, "reasoning": self._reason, "edge": self._edge, "content": self._answer}
        while self._buffer and steps[self._state](found):
            pass
        return found

    def interrupt(self) -> list[Delta]:
        """A call begins here: the text before it is complete, and the reasoning may continue after it."""
        found = self._rest(self._buffer)
        self._buffer, self._blank = "", []
        self._state = "reasoning" if self.reasoning else "edge"
        return found

    def finish(self) -> list[Delta]:
        """The remaining text, which could have become a tag; dropped if it clearly was one."""
        rest = self._buffer if self._exact else self._both.unless_cut(self._buffer)
        if self._state == "start" and not self._opened:
            rest = "".join(self._blank) + rest
        self._buffer = ""
        return self._rest(rest)

    def _rest(self, rest: str) -> list[Delta]:
        if self.reasoning:
            rest = self._pass(rest)
            return [Reasoning(rest)] if rest else []
        return [Text(rest)] if rest else []

    # States: each returns whether it made progress.

    def _edge(self, found: list[Delta]) -> bool:
        self._skip_blanks()
        if self._buffer and self._at_tag():
            return True
        if self._waits():
            return False
        if self._state == "start" and not self._opened:
            self._buffer = "".join(self._blank) + self._buffer
        self._state = "reasoning" if self.reasoning else "content"
        return True

    def _reason(self, found: list[Delta]) -> bool:
        tag = self._ends.find(self._buffer)
        size = tag[0] if tag else self._ends.ready(self._buffer)
        if text := self._pass(self._buffer[:size]):
            found.append(Reasoning(text))
        self._buffer = self._buffer[size:]
        return tag is not None and self._at_tag()

    def _answer(self, found: list[Delta]) -> bool:
        tag, size = None, len(self._buffer)
        if self._exact:
            tag = self._both.find(self._buffer)
            size = tag[0] if tag else self._both.ready(self._buffer)
        if size:
            found.append(Text(self._buffer[:size]))
        self._buffer = self._buffer[size:]
        return tag is not None and self._at_tag()

    # Shared by the states.

    def _at_tag(self) -> bool:
        """Take a tag at the beginning of the buffer."""
        opens = self._buffer.startswith(self._tags.open)
        if not opens and not self._buffer.startswith(self._tags.close):
            return False
        self._buffer = self._buffer[len(self._tags.open if opens else self._tags.close) :]
        self._state = "reasoning" if opens else "edge"
        return True

    def _waits(self) -> bool:
        """Whether the buffer may still become a tag."""
        return self._tags.open.startswith(self._buffer) or self._tags.close.startswith(self._buffer)

    def _skip_blanks(self) -> None:
        text = self._buffer.lstrip()
        if self._state == "start" and len(text) < len(self._buffer):
            self._blank.append(self._buffer[: len(self._buffer) - len(text)])
        self._buffer = text

    def _pass(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        text = self._trailing.push(text)
        self._begun = self._begun or bool(text)
        return text


class ReasoningCounter:
    """Counts the tokens between the reasoning tags, exactly, by token id: neither the tags nor calls.

    If a tag is not a single token, each piece that starts inside the reasoning counts in full.
    """

    def __init__(self, open_id: int | None, close_id: int | None, opened: bool) -> None:
        self._open, self._close = open_id, close_id
        self._inside = opened
        self.tokens = 0

    def push(self, tokens: Sequence[int], reasoning: bool, calling: bool) -> None:
        """Account for one piece of output. The flags are the parser's state before it."""
        if self._close is None:
            self.tokens += len(tokens) if reasoning else 0
            return
        if calling:
            return  # a tag in a call's arguments is no tag
        for token in tokens:
            if token == self._close:
                self._inside = False
            elif token == self._open:
                self._inside = True
            elif self._inside:
                self.tokens += 1
