"""Parses a complete output: splits off reasoning (and counts its tokens) and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from farthing.conversation.deltas import CallStart, Delta, Reasoning
from farthing.conversation.marks import MARK, SpecialTokens, plain
from farthing.conversation.parse.base import CallParser
from farthing.conversation.scan import Trailing, literals


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags around the reasoning."""

    open: str = "<think>"
    close: str = "</think>"


THINK = Tags()


class OutputParser:
    """Converts pieces of text to deltas. The assembled answer does not depend on where the pieces are cut.

    tags: None if the output is not parsed for reasoning. opened: the prompt already opened it. tokens: the
    markup that the model writes as special tokens, each of which follows MARK; where the same text is spelled
    by other tokens, it is no markup.
    """

    def __init__(
        self,
        calls: CallParser,
        tags: Tags | None = None,
        opened: bool = False,
        tokens: frozenset[str] = frozenset(),
    ) -> None:
        self._calls = calls
        self._tokens = SpecialTokens(tokens) if tokens else None
        self._reasoning = None if tags is None else ReasoningSplitter(tags, opened, calls.openers)

    @property
    def calls(self) -> int:
        """The number of calls begun so far."""
        return self._calls.calls

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.reasoning

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        if self._tokens is None:
            return self._parse(text)
        return _plain(self._parse(self._tokens.push(text)))

    def finish(self) -> list[Delta]:
        """The deltas still held back at the end of the output."""
        deltas = self._parse(self._tokens.finish()) if self._tokens is not None else []
        if self._reasoning is not None:
            deltas += self._split(self._reasoning.finish())
        return _plain(deltas + self._calls.finish())

    def _parse(self, text: str) -> list[Delta]:
        if self._reasoning is None:
            return self._calls.push(text)
        return self._split(self._reasoning.push(text))

    def _split(self, parts: list[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for kind, text in parts:
            if kind == "reasoning":
                deltas.append(Reasoning(text))
            else:
                deltas += self._calls.push(text)
        return deltas


def _plain(deltas: list[Delta]) -> list[Delta]:
    shown: list[Delta] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            shown.append(replace(delta, name=plain(delta.name), id=plain(delta.id)))
        elif MARK not in delta.text:
            shown.append(delta)
        elif text := plain(delta.text):
            shown.append(replace(delta, text=text))
    return shown


Kind = Literal["reasoning", "content"]
Part = tuple[Kind, str]


class ReasoningSplitter:
    """Splits text into (kind, text) parts and drops white space around the tags.

    Models write reasoning in three ways: with both tags, with the closing tag alone because the prompt ends
    with the opening one, or with no tag. A model may also repeat the prompt's tag, and a call begun inside
    the reasoning (one of `openers`) ends it.
    """

    def __init__(self, tags: Tags, opened: bool, openers: frozenset[str] = frozenset()) -> None:
        self._tags, self._opened, self._openers = tags, opened, openers
        self._ends = literals(openers | {tags.close})
        self._buffer = ""
        self._state: Literal["start", "reasoning", "closed", "content"] = "start"
        self._trailing = Trailing()
        self._begun = False  # some reasoning was sent
        self._blank: list[str] = []  # leading white space, kept if the output has no tags

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        return self._state == "reasoning" or (self._state == "start" and self._opened)

    def push(self, text: str) -> list[Part]:
        """Parse one more piece and return the deltas that are certain."""
        self._buffer += text
        parts: list[Part] = []
        if self._state == "start":
            self._start()
        if self._state == "reasoning":
            self._reason(parts)
        if self._state == "closed":
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._state = "content"
        if self._state == "content" and self._buffer:
            parts.append(("content", self._buffer))
            self._buffer = ""
        return parts

    def finish(self) -> list[Part]:
        """The remaining text, which could have become a tag; dropped if it clearly was one."""
        rest, self._buffer = self._ends.unless_cut(self._buffer), ""
        if self._state == "start" and not self._opened:
            rest = "".join(self._blank) + rest
        elif self.reasoning:
            rest = self._pass(rest)
            return [("reasoning", rest)] if rest else []
        return [("content", rest)] if rest else []

    def _start(self) -> None:
        text = self._buffer.lstrip()
        if len(text) < len(self._buffer):
            self._blank.append(self._buffer[: len(self._buffer) - len(text)])
            self._buffer = text
        if text.startswith(self._tags.open):
            self._buffer, self._state = text[len(self._tags.open) :], "reasoning"
        elif not self._tags.open.startswith(text):
            self._state = "reasoning" if self._opened else "content"
            if not self._opened:
                self._buffer = "".join(self._blank) + text

    def _reason(self, parts: list[Part]) -> None:
        found = self._ends.find(self._buffer)
        size = found[0] if found else self._ends.ready(self._buffer)
        text, self._buffer = self._pass(self._buffer[:size]), self._buffer[size:]
        if text:
            parts.append(("reasoning", text))
        if found is None:
            return
        if self._buffer.startswith(self._tags.close):
            self._buffer, self._state = self._buffer[len(self._tags.close) :], "closed"
        else:
            self._state = "content"

    def _pass(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        text = self._trailing.push(text)
        self._begun = self._begun or bool(text)
        return text


class ReasoningCounter:
    """Counts the tokens between the reasoning tags, excluding the tags, exactly: by token id.

    If a tag is not a single token, each piece that starts inside the reasoning counts in full.
    """

    def __init__(self, open_id: int | None, close_id: int | None, opened: bool) -> None:
        self._open, self._close = open_id, close_id
        self._inside = opened
        self.tokens = 0

    def push(self, tokens: Sequence[int], began_inside: bool, still_inside: bool) -> None:
        """Account for one piece of output. The flags are the parser's state before and after it."""
        if self._close is None:
            self.tokens += len(tokens) if began_inside else 0
            return
        for token in tokens:
            if token == self._close:
                self._inside, self._open = False, None
            elif token == self._open:
                self._inside = True
            elif self._inside:
                self.tokens += 1
        if began_inside and not still_inside:  # a call ended it, not its tag
            self._inside = False
