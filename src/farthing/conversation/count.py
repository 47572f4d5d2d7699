"""How many tokens of an output are reasoning: by token ids, so the count is exact."""

from __future__ import annotations

from collections.abc import Sequence


class ReasoningCounter:
    """Counts the tokens between the reasoning's tags, the tags left out.

    Without single tokens for both tags, a piece counts as a whole where it began inside the reasoning.
    """

    def __init__(self, open_id: int | None, close_id: int | None, opened: bool) -> None:
        self._open, self._close = open_id, close_id
        self._inside = opened
        self.tokens = 0

    def push(self, tokens: Sequence[int], began_inside: bool, still_inside: bool) -> None:
        """Account for one piece of output; the parser says where it stood before and after it."""
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
        if began_inside and not still_inside:  # ended by a call and not by its tag
            self._inside = False
