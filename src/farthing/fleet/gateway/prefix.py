"""The prompt blocks cached on each replica: reported ones, and those sent since."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

_GRACE_S = 30.0  # a sent block counts as cached for this long without being in a digest: it may be queued


class PrefixIndex:
    """Blocks per replica, at most `entries` each; the least recently used are evicted first.

    A replica's published cache digest (Farthing) is authoritative. For other servers the index records what
    was sent to them and assumes a cache of `entries` blocks.
    """

    def __init__(self, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._clock = entries, clock
        self._blocks: dict[str, OrderedDict[int, float]] = {}  # replica -> block -> when it was sent

    def held(self, blocks: Sequence[int]) -> dict[str, int]:
        """{replica: number of leading blocks cached}, omitting replicas with none."""
        counts = {}
        for replica, known in self._blocks.items():
            depth = next((i for i, block in enumerate(blocks) if block not in known), len(blocks))
            if depth:
                counts[replica] = depth
        return counts

    def learn(self, blocks: Sequence[int], replica: str) -> None:
        """Record that a request with these blocks was sent to `replica`."""
        now = self._clock()
        known = self._blocks.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the first ones are shared most, so evict them last
            known[block] = now
            known.move_to_end(block)
        while len(known) > self._entries:
            known.popitem(last=False)

    def replace(self, replica: str, blocks: Iterable[int]) -> None:
        """Set the blocks that `replica` reports, least recently used first."""
        since = self._clock() - _GRACE_S
        known = OrderedDict.fromkeys(blocks, 0.0)
        for block, sent in self._blocks.get(replica, {}).items():
            if sent > since:
                known[block] = sent
                known.move_to_end(block)
        self._blocks[replica] = known

    def forget(self, replica: str) -> None:
        """Drop a replica that is gone."""
        self._blocks.pop(replica, None)
