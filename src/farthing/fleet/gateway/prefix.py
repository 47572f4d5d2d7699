"""The prompt blocks each replica holds: those it reports, and those sent to it since."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

_GRACE_S = 30.0  # a block that was sent is believed for so long, though no digest names it: it may wait


class PrefixIndex:
    """Blocks per replica, at most `entries` of each: the least recently used are forgotten first.

    A replica that publishes a digest of its cache (Farthing) is believed; of others the index knows what was
    sent to them, and assumes a cache of `entries` blocks.
    """

    def __init__(self, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._clock = entries, clock
        self._blocks: dict[str, OrderedDict[int, float]] = {}  # replica -> block -> when it was sent

    def held(self, blocks: Sequence[int]) -> dict[str, int]:
        """{replica: leading blocks it holds}; replicas that hold none are left out."""
        counts = {}
        for replica, known in self._blocks.items():
            depth = next((i for i, block in enumerate(blocks) if block not in known), len(blocks))
            if depth:
                counts[replica] = depth
        return counts

    def learn(self, blocks: Sequence[int], replica: str) -> None:
        """A request with these blocks went to `replica`."""
        now = self._clock()
        known = self._blocks.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the first ones are shared the most, and forgotten last
            known[block] = now
            known.move_to_end(block)
        while len(known) > self._entries:
            known.popitem(last=False)

    def replace(self, replica: str, blocks: Iterable[int]) -> None:
        """`replica` reports that it holds these blocks, the least recently used first."""
        since = self._clock() - _GRACE_S
        known = OrderedDict.fromkeys(blocks, 0.0)
        for block, sent in self._blocks.get(replica, {}).items():
            if sent > since:
                known[block] = sent
                known.move_to_end(block)
        self._blocks[replica] = known

    def forget(self, replica: str) -> None:
        """The replica is gone, and its cache with it."""
        self._blocks.pop(replica, None)
