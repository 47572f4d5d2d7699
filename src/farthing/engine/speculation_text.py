"""Drafts from the text itself: prompt lookup (Saxena 2023) over a suffix automaton of prompt and output."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from farthing.engine.generation import Generation
from farthing.engine.runner import Step
from farthing.engine.sequence import Scheduled
from farthing.engine.suffix_automaton import SuffixAutomaton

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 2  # tokens of a repeated ending that are worth a draft


class TextDrafter:
    """Drafts what followed the text's longest ending where it occurred before."""

    num_lookahead = 0
    costly = False

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self._automata: dict[int, SuffixAutomaton] = {}  # by sequence id

    def ready(self, seq: Generation) -> bool:
        """Always: automata catch up when they are used."""
        return True

    def observe(self, plan: Seq[Scheduled[Generation]], step: Step, hidden: Tensor, wanted: bool) -> None:
        """Drop the automata of sequences that have ended."""
        if not self._automata:
            return
        for item in plan:
            if not item.seq.active:
                self._automata.pop(item.seq.id, None)
        if len(self._automata) > 4 * len(plan) + 64:  # of cancelled sequences
            live = {item.seq.id for item in plan}
            self._automata = {k: v for k, v in self._automata.items() if k in live}

    def draft(self, seqs: Seq[Generation], most: Seq[int], price: float) -> list[list[int]]:
        """See `Drafter`."""
        return [self._continue(seq, count) for seq, count in zip(seqs, most, strict=True)]

    def _continue(self, seq: Generation, count: int) -> list[int]:
        automaton = self._automata.setdefault(seq.id, SuffixAutomaton())
        automaton.extend(seq.tokens[automaton.size :])
        if automaton.matched < _SHORTEST:
            return []
        return continuation(seq.tokens, automaton.earlier + 1, count)


def continuation(tokens: Seq[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; past the end of the text its last period repeats."""
    found = list(tokens[start : start + count])
    while len(found) < count:
        found += found[-(len(tokens) - start) :][: count - len(found)]
    return found
