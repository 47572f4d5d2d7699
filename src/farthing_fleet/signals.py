"""What a source of signals reports, and the metric names of the servers that it reads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from farthing_fleet.types import Snapshot

LAUNCH_METRIC = "farthing:launch_to_ready_seconds"  # gauge; only in Farthing's server


@dataclass(frozen=True)
class Dialect:
    """Metric names of one server. None: not reported.

    Names omit the suffix of their kind: counters add `_total`, histograms `_sum` and `_count`.
    """

    name: str
    running: str  # gauge, requests
    waiting: str  # gauge, requests
    kv_usage: str  # gauge, 0..1
    prompt_tokens: str  # counter
    output_tokens: str  # counter
    ttft: str  # histogram, seconds; its count is the requests with a first token
    queue_time: str | None = None  # histogram, seconds
    cache_hits: str | None = None  # counter, prompt tokens found in the prefix cache
    cache_queries: str | None = None  # counter, prompt tokens looked up
    tpot: tuple[str, ...] = ()  # histograms, seconds; the first one found is used


def _vllm_style(prefix: str) -> Dialect:
    return Dialect(
        name=prefix,
        running=f"{prefix}:num_requests_running",
        waiting=f"{prefix}:num_requests_waiting",
        kv_usage=f"{prefix}:kv_cache_usage_perc",
        prompt_tokens=f"{prefix}:prompt_tokens",
        output_tokens=f"{prefix}:generation_tokens",
        ttft=f"{prefix}:time_to_first_token_seconds",
        queue_time=f"{prefix}:request_queue_time_seconds",
        cache_hits=f"{prefix}:prefix_cache_hits",
        cache_queries=f"{prefix}:prefix_cache_queries",
        tpot=(f"{prefix}:inter_token_latency_seconds", f"{prefix}:time_per_output_token_seconds"),
    )


DIALECTS: dict[str, Dialect] = {
    # its prompt tokens are those that were computed, so none of them is to be deducted as cached
    "farthing": replace(_vllm_style("farthing"), cache_hits=None, cache_queries=None),
    "vllm": _vllm_style("vllm"),
    "sglang": replace(
        _vllm_style("sglang"),
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_usage="sglang:token_usage",
        queue_time="sglang:queue_time_seconds",
        cache_hits=None,
        cache_queries=None,
    ),
}


def dialect(name: str) -> Dialect | None:
    """The dialect called `name`; None for "auto". Raises ValueError for an unknown name."""
    if name == "auto":
        return None
    if name not in DIALECTS:
        raise ValueError(f"signals.metrics: got {name!r}; expected auto or one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def detect(names: Iterable[str]) -> Dialect | None:
    """The dialect whose queue gauge is among these metric names, or None."""
    present = set(names)
    return next((d for d in DIALECTS.values() if d.waiting in present or d.running in present), None)


class Source(Protocol):
    """Reads the signals of a fleet."""

    async def read(self, current: int) -> Snapshot:
        """The current signals; `current` is the number of requested replicas.

        An unreachable source returns a snapshot marked stale instead of raising.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


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
