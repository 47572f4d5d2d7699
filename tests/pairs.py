"""Few cases of a test that hold every pair of its parameters' values."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Pair = frozenset[tuple[str, Hashable]]


def cover(cases: Sequence[Mapping[str, Hashable]]) -> set[int]:
    """Indices of cases, by parameter, in which every pair of values occurs that occurs in any of them.

    A case is taken if it adds most pairs, the first of equals, so that the same cases are taken in every run.
    A test of one parameter keeps all its cases.
    """
    pairs = [_pairs(case) for case in cases]
    missing: set[Pair] = set().union(*pairs)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(pairs)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.add(best)
    return chosen


def _pairs(case: Mapping[str, Hashable]) -> set[Pair]:
    if len(case) == 1:
        return {frozenset(case.items())}
    return {frozenset(pair) for pair in combinations(sorted(case.items(), key=lambda item: item[0]), 2)}
