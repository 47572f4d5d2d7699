"""Limits on which token may come next: grammars, reasoning budgets, forbidden words.

A constraint follows one completion. The sampler reads its masks and reports the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farthing.engine.request import ReasoningParams

Masks = NDArray[np.bool_]


class Refused(ValueError):
    """The request's own limits end it: no token is left, or its grammar takes too long."""


class Constraint(Protocol):
    """A constraint on the continuation of a completion."""

    @property
    def stopped(self) -> bool:
        """Nothing may follow any more."""

    def consume(self, token: int) -> None:
        """Advance. Raises Refused if the token is not allowed."""

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed from here."""

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""

    def copy(self) -> Constraint:
        """An independent constraint in the same state."""


class ReasoningBudget:
    """Ends the reasoning after a number of tokens, by its closing tag, and applies `answer` only after it.

    The reasoning has `budget` tokens at most, its tags not counted; then only the tokens of the closing tag
    are allowed. Models also begin late, after a line break, or again amid the answer: what the budget has
    left applies there. answer: a constraint on what follows the reasoning; with one, reasoning does not
    begin again, and none of the tokens `ends` may end the completion before.
    """

    __slots__ = ("_answer", "_ends", "_inside", "_matched", "_opened", "_params", "_used")

    def __init__(
        self, params: ReasoningParams, answer: Constraint | None = None, ends: Iterable[int] = ()
    ) -> None:
        self._params, self._answer = params, answer
        self._ends = tuple(ends) if answer is not None else ()
        self._opened = params.open  # whether the next token is reasoning
        self._inside = params.open or params.start is not None  # whether it may be, or begin some
        if answer is not None and not params.open:
            self._inside = False  # nothing precedes the answer
        self._used = 0  # tokens of the reasoning
        self._matched = 0  # tokens of the closing tag that the completion ends with

    @property
    def stopped(self) -> bool:
        """Whether the answer's constraint allows nothing more."""
        return not self._inside and self._answer is not None and self._answer.stopped

    def consume(self, token: int) -> None:
        """Advance. Raises Refused if the token is not allowed."""
        if not self._inside:
            if self._answer is not None:
                self._answer.consume(token)
            return
        forced = self._forced()
        if forced not in (None, token):
            raise Refused(f"reasoning: token {token} exceeds the budget of {self._params.budget}")
        self._step(token)

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed from here."""
        here = self._fork()
        for position, token in enumerate(tokens):
            if not here._inside:
                rest = tokens[position:]
                return position + (self._answer.valid_prefix(rest) if self._answer is not None else len(rest))
            if here._forced() not in (None, token) or token in self._ends:
                return position
            here._step(token)
        return len(tokens)

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""
        allowed = np.ones((1 + len(drafts), vocab), dtype=np.bool_)
        here = self._fork()
        for position in range(1 + len(drafts)):
            if not here._inside:
                if self._answer is not None:
                    allowed[position:] = self._answer.masks(drafts[position:], vocab)
                break
            forced = here._forced()
            if forced is not None:
                allowed[position] = False
                allowed[position, forced] = True
            else:
                allowed[position, [token for token in self._ends if token < vocab]] = False
            if position < len(drafts):
                if forced not in (None, drafts[position]):
                    break  # the draft is refused: what follows it is not used
                here._step(drafts[position])
        return allowed

    def copy(self) -> ReasoningBudget:
        """An independent constraint in the same state."""
        twin = self._fork()
        twin._answer = None if self._answer is None else self._answer.copy()
        return twin

    def _fork(self) -> ReasoningBudget:
        """The reasoning's state alone; the answer's constraint is shared and must not be advanced."""
        twin = ReasoningBudget.__new__(ReasoningBudget)
        twin._params, twin._answer, twin._ends = self._params, self._answer, self._ends
        twin._opened, twin._inside = self._opened, self._inside
        twin._used, twin._matched = self._used, self._matched
        return twin

    def _forced(self) -> int | None:
        """The only token allowed, once the budget is spent. A closing tag begun within it is finished."""
        budget = self._params.budget
        if budget is None or not self._opened or self._used < budget:
            return None
        return self._params.end[self._matched]

    def _step(self, token: int) -> None:
        end = self._params.end
        if not self._opened:
            self._opened = token == self._params.start
            return
        self._used += 1
        self._matched = _matched(end, self._matched, token)
        if self._matched == len(end):
            self._used -= len(end)
            self._matched, self._opened = 0, False
            again = self._params.start is not None and self._params.budget is not None
            self._inside = again and self._answer is None


def _matched(end: Sequence[int], matched: int, token: int) -> int:
    """How many tokens of `end` a text ends with, after `matched` of them and one more token."""
    recent = [*end[:matched], token]
    return next((size for size in range(len(recent), 0, -1) if recent[-size:] == list(end[:size])), 0)


class Vocabulary:
    """Only some tokens, and no forbidden sequence of tokens."""

    __slots__ = ("_recent", "_rules")

    def __init__(self, allowed: Iterable[int] | None, forbidden: Iterable[Sequence[int]]) -> None:
        self._rules = _Rules(allowed, forbidden)
        self._recent: tuple[int, ...] = ()

    @property
    def stopped(self) -> bool:
        """Always false: the text may always continue."""
        return False

    def consume(self, token: int) -> None:
        """Advance; the masks have kept forbidden tokens away."""
        self._recent = self._rules.after(self._recent, token)

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed from here."""
        rules, recent = self._rules, self._recent
        for position, token in enumerate(tokens):
            outside = rules.allowed is not None and token not in rules.allowed
            if outside or any(token in last for last in rules.completing(recent)):
                return position
            recent = rules.after(recent, token)
        return len(tokens)

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""
        allowed = np.repeat(self._rules.row(vocab)[None], 1 + len(drafts), axis=0)
        recent = self._recent
        for position in range(1 + len(drafts)):
            for last in self._rules.completing(recent):
                allowed[position, last[last < vocab]] = False
            if position < len(drafts):
                recent = self._rules.after(recent, drafts[position])
        return allowed

    def copy(self) -> Vocabulary:
        """An independent constraint in the same state."""
        twin = Vocabulary.__new__(Vocabulary)
        twin._rules, twin._recent = self._rules, self._recent
        return twin


class _Rules:
    """What a `Vocabulary` and its copies share."""

    __slots__ = ("_before", "_lengths", "_row", "allowed")

    def __init__(self, allowed: Iterable[int] | None, forbidden: Iterable[Sequence[int]]) -> None:
        self.allowed = None if allowed is None else frozenset(allowed)
        last_tokens: dict[tuple[int, ...], set[int]] = {}
        for *before, last in forbidden:
            last_tokens.setdefault(tuple(before), set()).add(last)
        # The last tokens of forbidden sequences, by what precedes them.
        self._before = {before: np.array(sorted(last), np.int64) for before, last in last_tokens.items()}
        self._lengths = sorted({len(before) for before in self._before})
        self._row = np.empty(0, np.bool_)

    def row(self, vocab: int) -> NDArray[np.bool_]:
        """[vocab]: the allowed tokens, forbidden sequences aside. Not to be written to."""
        if len(self._row) != vocab:
            row = np.full(vocab, self.allowed is None)
            if self.allowed is not None:
                tokens = np.fromiter(self.allowed, np.int64, len(self.allowed))
                row[tokens[tokens < vocab]] = True
            self._row = row
        return self._row

    def after(self, recent: tuple[int, ...], token: int) -> tuple[int, ...]:
        """As much of a text's end as forbidden sequences can begin with."""
        span = self._lengths[-1] if self._lengths else 0
        return (*recent, token)[-span:] if span else ()

    def completing(self, recent: tuple[int, ...]) -> Iterator[NDArray[np.int64]]:
        """Tokens that would complete a forbidden sequence, in any number of arrays."""
        for size in self._lengths:
            if size <= len(recent):
                last = self._before.get(recent[len(recent) - size :])
                if last is not None:
                    yield last


class All:
    """Several constraints at once."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self._parts = tuple(parts)

    @property
    def stopped(self) -> bool:
        """Whether any of them allows nothing more."""
        return any(part.stopped for part in self._parts)

    def consume(self, token: int) -> None:
        """Advance. Raises Refused if the token is not allowed."""
        for part in self._parts:
            part.consume(token)

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` all of them allow from here."""
        return min(part.valid_prefix(tokens) for part in self._parts)

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what all of them allow."""
        first, *others = (part.masks(drafts, vocab) for part in self._parts)
        for mask in others:
            first = first & mask
        return first

    def copy(self) -> All:
        """An independent constraint in the same state."""
        return All([part.copy() for part in self._parts])
