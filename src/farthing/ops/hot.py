"""Which experts of a layer deserve a place on the fast device: the most used of late. Integers alone.

Use is counted by token and decays, so that the set follows the traffic. An expert takes another's place only
where it is used clearly more (MARGIN), since a place costs a transfer of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

MARGIN = 1.25
HALF_LIFE = 256  # steps after which a token counts half
_RESCALE = 1e12


class HotExperts:
    """The books of one layer: `held` are in their places, `coming` are on their way to one."""

    def __init__(self, capacity: int, half_life: float = HALF_LIFE) -> None:
        """capacity: places. Never more experts are held and coming together."""
        self.capacity = capacity
        self.held: set[int] = set()
        self.coming: set[int] = set()
        self._growth = 2.0 ** (1 / half_life)
        self._weight = 1.0  # of a token now: it grows instead of all others shrinking
        self._use: dict[int, float] = {}

    def record(self, tokens: Mapping[int, int]) -> None:
        """Tokens of each expert in one step."""
        self._weight *= self._growth
        if self._weight > _RESCALE:
            self._use = {expert: use / self._weight for expert, use in self._use.items()}
            self._weight = 1.0
        for expert, count in tokens.items():
            self._use[expert] = self._use.get(expert, 0.0) + count * self._weight

    def use(self, expert: int) -> float:
        """Decayed tokens."""
        return self._use.get(expert, 0.0) / self._weight

    def decide(self) -> tuple[int | None, int] | None:
        """(who leaves, who comes): the most used expert without a place, for a free place or for that of the
        least used. None where nobody gains enough. The one that leaves is out at once; `arrived` ends the
        way of the other."""
        outside = [e for e in self._use if e not in self.held and e not in self.coming]
        if not outside or self.capacity == 0:
            return None
        best = max(outside, key=lambda e: (self._use[e], -e))
        leaving = None
        if len(self.held) + len(self.coming) >= self.capacity:
            if not self.held:
                return None
            leaving = min(self.held, key=lambda e: (self.use(e), e))
            if self.use(best) <= MARGIN * self.use(leaving):
                return None
            self.held.remove(leaving)
        self.coming.add(best)
        return leaving, best

    def arrived(self, expert: int) -> None:
        """Its weights are in their place."""
        self.coming.remove(expert)
        self.held.add(expert)
