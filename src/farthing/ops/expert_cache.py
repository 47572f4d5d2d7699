"""Which experts of a layer to keep on the fast device: the most frequently used. Integers only.

Use is counted in tokens and decays exponentially, so the set follows the traffic. An expert replaces another
only if it is used clearly more (MARGIN), because a replacement transfers the expert's weights.
"""

from __future__ import annotations

from collections.abc import Mapping

MARGIN = 1.25
HALF_LIFE = 256  # steps after which a token counts half
_RESCALE = 1e12


class ExpertCache:
    """Cache state of one layer: `resident` experts are on the device, `loading` ones are in flight."""

    def __init__(self, capacity: int, half_life: float = HALF_LIFE) -> None:
        """capacity: maximum number of resident and loading experts together."""
        self.capacity = capacity
        self.resident: set[int] = set()
        self.loading: set[int] = set()
        self._growth = 2.0 ** (1 / half_life)
        self._weight = 1.0  # weight of a token in the current step; grows so that earlier counts decay
        self._use: dict[int, float] = {}

    def record(self, tokens: Mapping[int, int]) -> None:
        """Count one step's tokens per expert."""
        self._weight *= self._growth
        if self._weight > _RESCALE:
            self._use = {expert: use / self._weight for expert, use in self._use.items()}
            self._weight = 1.0
        for expert, count in tokens.items():
            self._use[expert] = self._use.get(expert, 0.0) + count * self._weight

    def use(self, expert: int) -> float:
        """Decayed token count."""
        return self._use.get(expert, 0.0) / self._weight

    def decide(self) -> tuple[int | None, int] | None:
        """(expert to evict or None, expert to load), or None if no replacement is worth a transfer.

        The evicted expert leaves `resident` at once; `loaded` completes the load of the other.
        """
        outside = [e for e in self._use if e not in self.resident and e not in self.loading]
        if not outside or self.capacity == 0:
            return None
        best = max(outside, key=lambda e: (self._use[e], -e))
        evicted = None
        if len(self.resident) + len(self.loading) >= self.capacity:
            if not self.resident:
                return None
            evicted = min(self.resident, key=lambda e: (self.use(e), e))
            if self.use(best) <= MARGIN * self.use(evicted):
                return None
            self.resident.remove(evicted)
        self.loading.add(best)
        return evicted, best

    def loaded(self, expert: int) -> None:
        """The expert's weights are on the device."""
        self.loading.remove(expert)
        self.resident.add(expert)
