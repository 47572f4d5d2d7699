"""The interface and the shared machinery of the call parsers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from farthing.conversation.deltas import CallArguments, CallStart, Delta, Text, new_call_id

# A longer tag or function name is not markup; without a limit it could hold back the stream forever.
MAX_HEAD = 512


class CallParser(Protocol):
    """Parses calls from the text that follows the reasoning."""

    calls: int  # begun so far
    openers: frozenset[str]  # strings that begin a call and thereby end an open reasoning

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""

    def finish(self) -> list[Delta]:
        """The remaining deltas at the end of the output. A truncated call keeps the arguments it has."""


class NoCalls:
    """A parser that finds no calls."""

    calls = 0
    openers: frozenset[str] = frozenset()

    def push(self, text: str) -> list[Delta]:
        """The text itself."""
        return [Text(text)] if text else []

    def finish(self) -> list[Delta]:
        """Nothing is ever held back."""
        return []


class Machine:
    """States that consume from a buffer. A state returns whether it made progress, and if not waits for more
    text; it must leave at most a bounded number of characters behind."""

    def __init__(self) -> None:
        self.calls = 0
        self._buffer = ""
        self._out: list[Delta] = []
        self._state: Callable[[], bool]

    def push(self, text: str) -> list[Delta]:
        """Parse one more piece and return the deltas that are certain."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._taken()

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _take(self, size: int) -> str:
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def _text(self, text: str) -> None:
        if text:
            self._out.append(Text(text))

    def _begin(self, name: str, identity: str | None = None) -> None:
        self._out.append(CallStart(self.calls, identity or new_call_id(), name))
        self.calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(self.calls - 1, text))
