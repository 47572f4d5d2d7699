"""Log-probabilities of tokens, kept as the arrays of a step until they are read.

A request may need 20 tokens at each of thousands of positions. The engine's thread only keeps arrays;
`Position` creates Python objects when read, one position at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank from 1, and its text if there is a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Log-probabilities at n positions: column 0 is the next token, then the likeliest, best first."""

    ids: NDArray[np.int32]  # [n, 1 + k]
    values: NDArray[np.float32]  # [n, 1 + k]
    ranks: NDArray[np.int32]  # [n], of column 0


class Position(Mapping[int, Logprob]):
    """Log-probabilities at one position by token: the next token, then the `top` likeliest."""

    __slots__ = ("_made", "_row", "_table", "_text", "top")

    def __init__(self, table: Table, row: int, top: int, text: Callable[[int], str] | None = None) -> None:
        """text: maps a token to its text, for `decoded_token`."""
        self._table, self._row, self._text, self.top = table, row, text, top
        self._made: dict[int, Logprob] | None = None

    @property
    def logprob(self) -> float:
        """Log-probability of the next token."""
        return float(self._table.values[self._row, 0])

    def own(self) -> tuple[int, float, int]:
        """(id, log-probability, rank) of the next token."""
        table, row = self._table, self._row
        return int(table.ids[row, 0]), float(table.values[row, 0]), int(table.ranks[row])

    def best(self, count: int) -> Iterator[tuple[int, float]]:
        """(id, log-probability) of the `count` likeliest tokens (at most `top`), best first."""
        end = 1 + min(count, self.top)
        ids, values = self._table.ids[self._row, 1:end], self._table.values[self._row, 1:end]
        return zip(ids.tolist(), values.tolist(), strict=True)

    def entries(self) -> list[tuple[int, float, int]]:
        """(id, log-probability, rank) of each token, the next token first."""
        own = self.own()
        others = enumerate(self.best(self.top), start=1)
        return [own, *((token, value, rank) for rank, (token, value) in others if token != own[0])]

    def __getitem__(self, token: int) -> Logprob:
        return self._dict()[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def __repr__(self) -> str:
        return repr(self._dict())

    def _dict(self) -> dict[int, Logprob]:
        if self._made is None:
            text = self._text
            self._made = {
                token: Logprob(value, rank, None if text is None else text(token))
                for token, value, rank in self.entries()
            }
        return self._made


def positions(table: Table, top: Sequence[int], text: Callable[[int], str] | None = None) -> list[Position]:
    """All positions of a table; top[i]: number of likeliest tokens at position i."""
    return [Position(table, row, count, text) for row, count in enumerate(top)]
