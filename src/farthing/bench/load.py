"""Send a workload to a server and summarize the latencies its users see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from farthing.bench.client import Target, Timing, complete
from farthing.bench.workload import Request

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets per request, in seconds."""

    ttft: float = 2.0
    tpot: float = 0.2

    def kept(self, timing: Timing) -> bool:
        """Whether a request met both targets."""
        return timing.error is None and timing.ttft <= self.ttft and timing.tpot <= self.tpot


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Results of a run; latencies in milliseconds by percentile."""

    requests: int
    failed: int
    errors: tuple[str, ...]  # distinct, at most five
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    e2e_ms: dict[str, float]
    goodput: float  # share of requests within the SLO
    usd_per_hour: float | None

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per second over the whole run."""
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        """Prompt and generated tokens per second over the whole run."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Completed requests per second."""
        return (self.requests - self.failed) / self.seconds

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Price per million generated tokens on hardware at this hourly price."""
        if self.usd_per_hour is None or not self.output_tokens:
            return None
        return self.usd_per_hour / 3600 * self.seconds / self.output_tokens * 1e6

    def to_json(self) -> dict[str, Any]:
        """All figures, including derived ones."""
        names = ("output_tokens_per_second", "total_tokens_per_second", "requests_per_second")
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        derived = {name: getattr(self, name) for name in (*names, "usd_per_million_tokens")}
        return fields | derived


async def run_load(
    target: Target,
    workload: Sequence[Request],
    concurrency: int | None = None,
    on_done: Callable[[Timing], None] = lambda _: None,
    **options: Any,
) -> list[Timing]:
    """Send requests at their times, or `concurrency` at a time in order; returns timings in order."""
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}; expected at least 1, or none for an open loop")
    gate = asyncio.Semaphore(concurrency or len(workload) or 1)
    start = time.perf_counter()

    async def one(request: Request) -> Timing:
        async with gate:
            if concurrency is None:
                await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
            timing = await complete(target, request.prompt, request.max_tokens, **options)
            on_done(timing)
            return timing

    return await asyncio.gather(*(one(r) for r in workload))


def summarize(timings: Sequence[Timing], slo: Slo, usd_per_hour: float | None = None) -> LoadResult:
    """Percentiles over successful requests; failures lower the goodput."""
    good = [t for t in timings if t.error is None]
    gaps = [gap for t in good for gap in t.gaps]
    errors = dict.fromkeys(t.error for t in timings if t.error is not None)
    return LoadResult(
        requests=len(timings),
        failed=len(timings) - len(good),
        errors=tuple(errors)[:5],
        seconds=max(t.end for t in timings) - min(t.start for t in timings),
        prompt_tokens=sum(t.prompt_tokens for t in good),
        cached_tokens=sum(t.cached_tokens for t in good),
        output_tokens=sum(t.output_tokens for t in good),
        ttft_ms=percentiles([t.ttft for t in good]),
        tpot_ms=percentiles([t.tpot for t in good if t.output_tokens > 1]),
        itl_ms=percentiles(gaps),
        e2e_ms=percentiles([t.e2e for t in good]),
        goodput=sum(slo.kept(t) for t in timings) / len(timings),
        usd_per_hour=usd_per_hour,
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds by percentile; empty without values."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1000, PERCENTILES)
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, values, strict=True)}
