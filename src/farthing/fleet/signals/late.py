"""The share of requests that miss a limit, from the cumulative buckets of a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping


def bound_of(label: str) -> float:
    """The upper bound in an `le` label. Raises ValueError."""
    return math.inf if label == "+Inf" else float(label)


def late_count(buckets: Mapping[float, float], limit: float) -> float:
    """Observations above `limit`; `buckets` are cumulative counts by upper bound.

    Interpolates linearly within the bucket of the limit. Observations above the highest finite bound are late
    even if the limit is higher. The result is linear in the counts, so it can be differenced like a counter.
    """
    total = max(buckets.values(), default=0.0)
    below, start = 0.0, 0.0
    for bound in sorted(b for b in buckets if math.isfinite(b)):
        if bound >= limit:
            share = (limit - start) / (bound - start) if bound > start else 1.0
            return total - below - share * (buckets[bound] - below)
        below, start = buckets[bound], bound
    return total - below
