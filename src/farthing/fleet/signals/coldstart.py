"""Launch-to-ready times. Their P90 is the lead time of forecasts."""

from __future__ import annotations

import math
from collections import deque


class ColdStarts:
    """The last launch-to-ready times of a deployment, in seconds."""

    def __init__(self, keep: int = 64) -> None:
        self._seconds: deque[float] = deque(maxlen=keep)

    def add(self, seconds: float) -> None:
        """Record one launch. Ignores negative or non-finite times (after a clock change)."""
        if math.isfinite(seconds) and seconds >= 0:
            self._seconds.append(seconds)

    @property
    def p90(self) -> float | None:
        """Nearest-rank 90th percentile; None before the first launch."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        return ordered[math.ceil(0.9 * len(ordered)) - 1]

    def __len__(self) -> int:
        return len(self._seconds)
