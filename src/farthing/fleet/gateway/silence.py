"""Detects hung replicas, which accept requests but send nothing."""

from __future__ import annotations

from bisect import insort
from collections import deque

from farthing.fleet.gateway.replicas import Replica

_WINDOW = 1024  # number of TTFTs kept
_ENOUGH = 100  # with fewer TTFTs, only health checks detect failures


class Silence:
    """The P99 time to first token of streams over all replicas, plus a margin.

    A replica is hung if it has sent no byte of any answer for that long while a stream waits for its first
    one. Answers that are not streamed do not count: they are silent until complete.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, seconds: float) -> None:
        """Record one time to first token."""
        if len(self._recent) == _WINDOW:
            self._sorted.remove(self._recent.popleft())
        self._recent.append(seconds)
        insort(self._sorted, seconds)

    @property
    def limit_s(self) -> float | None:
        """Maximum seconds of silence; None while too few TTFTs are known."""
        if len(self._sorted) < _ENOUGH:
            return None
        return self._sorted[int(len(self._sorted) * 0.99)] + self._margin_s

    def hung(self, replica: Replica, now: float) -> bool:
        """Whether the replica has been silent for too long."""
        limit = self.limit_s
        if limit is None or now - replica.heard <= limit:
            return False
        return any(a.streamed and not a.heard and now - a.began > limit for a in replica.active)
