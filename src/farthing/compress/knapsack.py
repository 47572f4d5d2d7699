"""The multiple-choice knapsack: one option per row, least total value within a cost limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def knapsack(
    rows: Sequence[Sequence[T]],
    cost: Callable[[T], float],
    value: Callable[[T], float],
    limit: float,
    cells: int,
) -> list[T]:
    """Dynamic programming over `cells` cells of cost, minimizing the total value.

    Costs are rounded up, so the limit holds. If rounding makes every choice exceed the limit, the cheapest
    one is taken if it fits. Raises ValueError if it does not.
    """

    def steps(option: T) -> int:
        if cost(option) == 0:
            return 0
        return math.ceil(cost(option) / limit * cells - 1e-9) if limit > 0 else cells + 1

    best: dict[int, tuple[float, list[T]]] = {0: (0.0, [])}  # cells spent -> (value, choice)
    for row in rows:
        reached: dict[int, tuple[float, list[T]]] = {}
        for spent, (total, chosen) in best.items():
            for option in row:
                used = spent + steps(option)
                candidate = total + value(option)
                if used <= cells and (used not in reached or candidate < reached[used][0]):
                    reached[used] = (candidate, [*chosen, option])
        best = _undominated(reached)
    if best:
        return min(best.values(), key=lambda entry: entry[0])[1]
    cheapest = [min(row, key=cost) for row in rows]
    least = sum(map(cost, cheapest))
    if least > limit:
        raise ValueError(f"the limit is {limit:g}; expected at least {least:g}, the cheapest plan")
    return cheapest


def _undominated(reached: dict[int, tuple[float, list[T]]]) -> dict[int, tuple[float, list[T]]]:
    """Drop choices that another one beats in both cost and value."""
    kept, least = {}, math.inf
    for spent in sorted(reached):
        if reached[spent][0] < least:
            kept[spent] = reached[spent]
            least = reached[spent][0]
    return kept
