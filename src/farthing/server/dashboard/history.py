"""Counters to curves: a ring of points for the dashboard.

A source document has cumulative `counters`, momentary `gauges` and cumulative `histograms`; a point has
rates, ratios and quantiles over a short window that ends at it. A value that the source lacks, or without an
event in the window, is None: a gap in the curve, not a zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# point -> counter; per second
RATES = {
    "generation_tps": "generation_tokens",
    "prompt_tps": "prompt_tokens",
    "requests_ps": "requests",
    "watts": "joules",
    "busy": "busy_seconds",
    "errors_ps": "errors",
}
# point -> (numerator, denominator, factor)
RATIOS = {
    "prefix_hit": ("prefix_cache_hits", "prefix_cache_queries", 1.0),
    "acceptance": ("accepted_tokens", "draft_tokens", 1.0),
    "accepted_length": ("accepted_tokens", "drafts", 1.0),
    "usd_per_million": ("usd", "tokens", 1e6),
}
QUANTILES = {"p50": 0.5, "p95": 0.95}


@dataclass(frozen=True, slots=True)
class Sample:
    """A source document and its time (wall clock, seconds)."""

    time: float
    data: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Any]:
        """`counters`, `gauges` or `histograms`; {} if the source has none."""
        found = self.data.get(name)
        return found if isinstance(found, Mapping) else {}


class History:
    """The last `keep` points, from samples at least `window` seconds apart."""

    def __init__(self, keep: int = 900, window: float = 5.0) -> None:
        self._points: deque[dict[str, float | None]] = deque(maxlen=keep)
        self._recent: deque[Sample] = deque()
        self._window = window
        self.last: Sample | None = None

    def add(self, time: float, data: Mapping[str, Any]) -> None:
        """Add a source document. If the clock jumps back, the curves restart."""
        sample = Sample(time, data)
        if self.last is not None and time <= self.last.time:
            self._points.clear()
            self._recent.clear()
        if self._recent and _restarted(self._recent[-1], sample):
            self._recent.clear()
        while len(self._recent) > 1 and self._recent[1].time <= time - self._window:
            self._recent.popleft()
        before = self._recent[0] if self._recent else None
        self._points.append({"t": time, **sample.part("gauges"), **_changes(before, sample)})
        self._recent.append(sample)
        self.last = sample

    def columns(self, since: float = 0.0) -> dict[str, list[float | None]]:
        """The points after `since`: one list per name, including `t`, all of the same length."""
        points = [p for p in self._points if (p["t"] or 0.0) > since]
        names = dict.fromkeys(name for point in points for name in point)
        return {name: [_short(point.get(name)) for point in points] for name in names}


def _restarted(before: Sample, now: Sample) -> bool:
    """Whether a counter decreased, which means that the source restarted."""
    old = before.part("counters")
    return any(value < old.get(name, value) for name, value in now.part("counters").items())


def _changes(before: Sample | None, now: Sample) -> dict[str, float | None]:
    """Rates, ratios and quantiles between two samples."""
    if before is None or now.time <= before.time:
        return {}
    delta = {
        name: value - before.part("counters").get(name, value) for name, value in now.part("counters").items()
    }
    seconds = now.time - before.time
    point: dict[str, float | None] = {
        name: delta[counter] / seconds for name, counter in RATES.items() if counter in delta
    }
    for name, (top, bottom, factor) in RATIOS.items():
        if top in delta and bottom in delta:
            point[name] = delta[top] / delta[bottom] * factor if delta[bottom] > 0 else None
    for name, histogram in now.part("histograms").items():
        earlier = before.part("histograms").get(name)
        counts = _difference(histogram["cumulative"], earlier["cumulative"] if earlier else None)
        for suffix, q in QUANTILES.items():
            point[f"{name}_{suffix}"] = quantile(histogram["bounds"], counts, q)
    return point


def _difference(now: Sequence[int], before: Sequence[int] | None) -> list[int]:
    return [n - b for n, b in zip(now, before, strict=True)] if before is not None else list(now)


def quantile(bounds: Sequence[float], cumulative: Sequence[int], q: float) -> float | None:
    """The q-quantile of a histogram, linear within a bucket as in Prometheus; None if it is empty.

    bounds: ascending upper bounds; cumulative: one more count than bounds, the last for all larger values.
    """
    total = cumulative[-1]
    if total <= 0:
        return None
    rank = q * total
    for index, upper in enumerate(bounds):
        if cumulative[index] >= rank:
            lower = bounds[index - 1] if index else 0.0
            below = cumulative[index - 1] if index else 0
            return lower + (upper - lower) * (rank - below) / (cumulative[index] - below)
    return bounds[-1]


def _short(value: float | None) -> float | None:
    """Round to six significant digits, which is enough for drawing."""
    return value if value is None or value > 1e8 else float(f"{value:.6g}")
