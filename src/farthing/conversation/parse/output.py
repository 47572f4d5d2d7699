"""Parses a complete output: splits reasoning from the answer, and calls from text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from farthing.conversation.deltas import CallStart, Delta, Text
from farthing.conversation.marks import MARK, SpecialTokens, plain
from farthing.conversation.parse.base import CallParser, Tags
from farthing.conversation.parse.reasoning import ReasoningSplitter

_SLICE = 4_096  # characters parsed at once: parsers copy what remains of their input at every tag


class OutputParser:
    """Converts pieces of text to deltas. The assembled answer does not depend on where the pieces are cut.

    tags: None if the output is not parsed for reasoning. opened: the prompt already opened it. tokens: the
    markup that the model writes as special tokens, each of which follows MARK; where the same text is spelled
    by other tokens, it is no markup.

    Calls are parsed first, because a call may begin inside the reasoning, and tags in its arguments are no
    tags. Only a forced call that is plain JSON follows the reasoning.
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
        self._splitter = None
        if tags is not None:
            self._splitter = ReasoningSplitter(tags, opened, exact=tags.close in tokens)

    @property
    def calls(self) -> int:
        """The number of calls begun so far."""
        return self._calls.calls

    @property
    def reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as is known."""
        return self._splitter is not None and self._splitter.reasoning and not self.calling

    @property
    def calling(self) -> bool:
        """Whether the next text belongs to a call, as far as is known."""
        return self._calls.anywhere and self._calls.inside

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        deltas: list[Delta] = []
        for at in range(0, len(text), _SLICE):
            piece = text[at : at + _SLICE]
            deltas += self._parse(piece if self._tokens is None else self._tokens.push(piece))
        return deltas if self._tokens is None else _plain(deltas)

    def finish(self) -> list[Delta]:
        """The deltas still held back at the end of the output."""
        deltas = self._parse(self._tokens.finish()) if self._tokens is not None else []
        if self._splitter is None:
            deltas += self._calls.finish()
        elif self._calls.anywhere:
            deltas += [*self._split(self._calls.finish()), *self._splitter.finish()]
        else:
            deltas += [*self._called(self._splitter.finish()), *self._calls.finish()]
        return _plain(deltas)

    def _parse(self, text: str) -> list[Delta]:
        if self._splitter is None:
            return self._calls.push(text)
        if self._calls.anywhere:
            return self._split(self._calls.push(text))
        return self._called(self._splitter.push(text))

    def _split(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Split the text between calls."""
        assert self._splitter is not None
        found: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, Text):
                found += self._splitter.push(delta.text)
                continue
            if isinstance(delta, CallStart):
                found += self._splitter.interrupt()
            found.append(delta)
        return found

    def _called(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Parse the calls of the answer."""
        found: list[Delta] = []
        for delta in deltas:
            found += self._calls.push(delta.text) if isinstance(delta, Text) else [delta]
        return found


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
