"""A grammar for parts of a text: it applies from each occurrence of an opening string until the grammar ends.

A grammar for the whole answer cannot enforce a schema on tool calls and still allow a free-text answer. Free
text needs no masks, except for the few tokens that would run past an opening string.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from farthing.conversation.marks import MARK, marked
from farthing.engine.constraints import Constraint, Masks
from farthing.engine.structured import Matcher
from farthing.engine.tokenizer import Tokenizer

_MARK = MARK.encode("utf-8", "surrogatepass")


class TokenTexts:
    """The bytes of every token, sorted, to find those that begin with a prefix.

    Those of control tokens follow a mark, so that no other tokens spell the same.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._control = frozenset(map(tokenizer.token_text, tokenizer.control_ids))
        self._bytes = [tokenizer.token_bytes(token) for token in range(vocab)]
        for token in tokenizer.control_ids:
            if token < vocab:
                self._bytes[token] = _MARK + self._bytes[token]
        order = sorted(range(vocab), key=self._bytes.__getitem__)
        self._sorted = [self._bytes[token] for token in order]
        self._order = order

    def of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._bytes[token]

    def spelled(self, text: str) -> bytes:
        """The bytes of a text, with every control token in it as that token."""
        return marked(text, self._control).encode("utf-8", "surrogatepass")

    def longer_than(self, prefix: bytes) -> list[int]:
        """Tokens that begin with a prefix and continue after it."""
        at = bisect_left(self._sorted, prefix)
        found = []
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            if len(self._sorted[at]) > len(prefix):
                found.append(self._order[at])
            at += 1
        return found

    def running_past(self, text: bytes) -> list[int]:
        """Tokens that contain a whole text and continue after it."""
        return [token for token, piece in enumerate(self._bytes) if text in piece[:-1]]


class Openers:
    """Recognizes opening strings at the end of a text. Immutable; shared by the completions of a request."""

    def __init__(self, openers: Sequence[str], texts: TokenTexts) -> None:
        self._openers = list(map(texts.spelled, openers))
        self._texts = texts
        self._reach = max(map(len, self._openers)) - 1
        whole = [texts.running_past(opener) for opener in self._openers]
        self._contained = sorted({token for tokens in whole for token in tokens})
        self._past: dict[bytes, list[int]] = {}  # rest of an opener -> tokens that run past it

    def after(self, tail: bytes, token: int) -> tuple[bytes, bool]:
        """The end of the text after one more token, and whether an opening string is complete."""
        text = tail + self._texts.of(token)
        opened = any(text.endswith(opener) for opener in self._openers)
        return text[-self._reach :] if self._reach else b"", opened

    def forbidden(self, tail: bytes) -> list[int]:
        """Tokens that would complete an opening string and run past it: the grammar begins at its end."""
        found = list(self._contained)
        for opener in self._openers:
            for size in range(1, len(opener)):
                if tail.endswith(opener[:size]):
                    rest = opener[size:]
                    if rest not in self._past:
                        self._past[rest] = self._texts.longer_than(rest)
                    found += self._past[rest]
        return found


class TriggeredGrammar:
    """A constraint: see the module. `outside` constrains the free text."""

    __slots__ = ("_fresh", "_inside", "_openers", "_outside", "_tail")

    def __init__(self, fresh: Matcher, openers: Openers, outside: Constraint | None = None) -> None:
        """fresh: the grammar's state right after an opening string; it is copied and never advanced."""
        self._fresh, self._openers, self._outside = fresh, openers, outside
        self._inside: Matcher | None = None
        self._tail = b""  # of the free text

    @property
    def stopped(self) -> bool:
        """Nothing may follow any more."""
        return self._inside is None and self._outside is not None and self._outside.stopped

    def consume(self, token: int) -> None:
        """Advance. Raises ValueError if the token is not allowed."""
        if self._inside is not None:
            self._inside.consume(token)
            if self._inside.stopped:
                self._inside, self._tail = None, b""
            return
        if self._outside is not None:
            self._outside.consume(token)
        self._tail, opened = self._openers.after(self._tail, token)
        if opened:
            self._inside = self._fresh.copy()

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed from here."""
        if not tokens:
            return 0
        here = self.copy()
        for position, token in enumerate(tokens):
            if not here._allows(token):
                return position
            here.consume(token)
        return len(tokens)

    def masks(self, drafts: Sequence[int], vocab: int) -> Masks:
        """[1 + len(drafts), vocab]: what may follow the completion and each further draft."""
        allowed = np.ones((1 + len(drafts), vocab), dtype=np.bool_)
        here = self.copy() if drafts else self
        for position in range(1 + len(drafts)):
            if here.stopped:
                break
            allowed[position] = here._row(vocab)
            if position < len(drafts):
                if not allowed[position, drafts[position]]:
                    break  # the draft is refused: what follows it is not used
                here.consume(drafts[position])
        return allowed

    def copy(self) -> TriggeredGrammar:
        """An independent constraint in the same state."""
        outside = None if self._outside is None else self._outside.copy()
        twin = TriggeredGrammar(self._fresh, self._openers, outside)
        twin._inside = None if self._inside is None else self._inside.copy()
        twin._tail = self._tail
        return twin

    def _row(self, vocab: int) -> Masks:
        source = self._inside or self._outside
        row = np.ones(vocab, dtype=np.bool_) if source is None else source.masks([], vocab)[0]
        if self._inside is None:
            row[[token for token in self._openers.forbidden(self._tail) if token < vocab]] = False
        return row

    def _allows(self, token: int) -> bool:
        source = self._inside or self._outside
        if source is not None and source.valid_prefix([token]) == 0:
            return False
        return self._inside is not None or token not in self._openers.forbidden(self._tail)
