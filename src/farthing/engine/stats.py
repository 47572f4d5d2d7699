"""Counters, gauges and histograms of an engine: plain numbers that a server exports to Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# Seconds. They start at 1 ms because a small model on a CPU is faster than the usual smallest bucket.
BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """bounds (seconds, upper, inclusive), cumulative counts with the +Inf bucket last, and the sum."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return self.cumulative[-1]


class Histogram:
    """Observations in fixed buckets."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation (seconds)."""
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def snapshot(self) -> HistogramSnapshot:
        """A consistent copy."""
        total, cumulative = 0, []
        for count in self.counts:
            total += count
            cumulative.append(total)
        return HistogramSnapshot(BUCKETS, tuple(cumulative), self.sum)


@dataclass(slots=True)
class DiskStats:
    """Counters of the prefix cache on disk since the engine was built, written by its threads."""

    hits: int = 0  # tokens read instead of computed
    read_bytes: int = 0
    read_seconds: float = 0.0
    written_bytes: int = 0
    write_seconds: float = 0.0
    evictions: int = 0  # files removed by this process
    errors: int = 0  # files that were damaged or could not be read or written
    stored_bytes: int = 0  # in the directory, by all processes


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """All statistics at one moment. Counters start at zero when the engine is built."""

    # gauges
    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float  # 0…1, share of blocks referenced by sequences
    # counters
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int  # prompt tokens looked up
    prefix_cache_hits: int  # prompt tokens found
    preemptions: int
    draft_tokens: int
    accepted_tokens: int
    drafts: int  # draft sequences verified (draft_tokens / drafts = mean draft length)
    steps: int
    busy_seconds: float  # wall time inside steps
    integrity_failures: int
    failed_steps: int
    prefix_disk: DiskStats
    requests_finished: dict[str, int]  # by finish reason
    # histograms, seconds
    time_to_first_token: HistogramSnapshot
    time_per_output_token: HistogramSnapshot  # mean over a request, first token excluded
    inter_token_latency: HistogramSnapshot
    e2e_request_latency: HistogramSnapshot
    request_queue_time: HistogramSnapshot
    # MoE layer index -> tokens of each expert; {} where the model is dense
    expert_tokens: dict[int, list[int]]
    uptime_seconds: float


@dataclass(slots=True)
class Stats:
    """Written by the engine's thread; `snapshot()` may be called from any."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafts: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    integrity_failures: int = 0
    failed_steps: int = 0
    disk: DiskStats = field(default_factory=DiskStats)
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0)
    )
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)
    e2e: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    scheduler: Callable[[], tuple[int, int, float, int]] = lambda: (0, 0, 0.0, 0)  # see `Scheduler.gauges`
    experts: Callable[[], dict[int, list[int]]] = dict  # reads the device's counts
    started: float = field(default_factory=time.monotonic)

    def snapshot(self) -> StatsSnapshot:
        """Current values. Each is consistent in itself; two of them may be one step apart."""
        running, waiting, usage, preemptions = self.scheduler()
        return StatsSnapshot(
            num_requests_running=running,
            num_requests_waiting=waiting,
            kv_cache_usage=usage,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
            preemptions=preemptions,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            drafts=self.drafts,
            steps=self.steps,
            busy_seconds=self.busy_seconds,
            integrity_failures=self.integrity_failures,
            failed_steps=self.failed_steps,
            prefix_disk=replace(self.disk),
            requests_finished=dict(self.finished),
            time_to_first_token=self.ttft.snapshot(),
            time_per_output_token=self.tpot.snapshot(),
            inter_token_latency=self.itl.snapshot(),
            e2e_request_latency=self.e2e.snapshot(),
            request_queue_time=self.queue.snapshot(),
            expert_tokens=self.experts(),
            uptime_seconds=time.monotonic() - self.started,
        )
