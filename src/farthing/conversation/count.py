"""Counts the reasoning tokens of an output by token id, so the count is exact."""

from __future__ import annotations

from collections.abc import Sequence


class ReasoningCounter:
    """Counts the tokens between the reasoning tags, excluding the tags.

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
