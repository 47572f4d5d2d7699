"""Drafts from the text itself: prompt lookup (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from farthing.engine.generation import Generation
from farthing.engine.runner import Step
from farthing.engine.sequence import Scheduled


class NgramDrafter:
    """What followed the last time these tokens stood here."""

    num_lookahead = 0
    costly = False

    def __init__(self, num_drafts: int, sizes: Seq[int] = (4, 3, 2)) -> None:
        self.num_drafts = num_drafts
        self._sizes = tuple(sizes)
        self._index: dict[int, _NgramIndex] = {}

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor) -> None:
        """Forget the sequences that have ended."""
        for item in plan:
            if not item.seq.active:
                self._index.pop(item.seq.id, None)
        if len(self._index) > 4 * len(plan) + 64:  # cancelled ones
            live = {item.seq.id for item in plan}
            self._index = {k: v for k, v in self._index.items() if k in live}

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
        """The continuation of the latest earlier occurrence of the longest known ending."""
        return [
            self._index.setdefault(seq.id, _NgramIndex(self._sizes)).lookup(seq.tokens, n)
            for seq, n in zip(seqs, most, strict=True)
        ]


class _NgramIndex:
    """Where each n-gram of one sequence was last followed by something; grown with the sequence."""

    __slots__ = ("_next", "_sizes", "_upto")

    def __init__(self, sizes: Seq[int]) -> None:
        self._sizes = sizes
        self._next: dict[tuple[int, ...], int] = {}
        self._upto = 0

    def lookup(self, tokens: list[int], count: int) -> list[int]:
        found = None
        # Index every ending but the last one, which is what is looked up.
        for end in range(max(1, self._upto), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(tokens[end - size : end])] = end
        self._upto = len(tokens)
        for size in self._sizes:
            if size <= len(tokens):
                found = self._next.get(tuple(tokens[-size:]))
                if found is not None:
                    return tokens[found : found + count]
        return []
