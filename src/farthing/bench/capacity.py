"""The highest request rate a server sustains within the SLO, an input of scaling policies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from farthing.bench.client import Target
from farthing.bench.load import LoadResult, Slo, run_load, summarize
from farthing.bench.workload import Shape, closed_loop, poisson


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured rate."""

    rate: float  # requests per second
    goodput: float
    ttft_p99_ms: float
    tpot_p99_ms: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity, with all trials."""

    requests_per_second: float
    tokens_per_second: float  # prompt + output at that rate
    output_tokens_per_second: float
    slo: Slo
    goodput: float  # required share of requests within the SLO
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        return asdict(self)


def find_capacity(
    target: Target,
    shape: Shape,
    slo: Slo,
    goodput: float = 0.99,
    seconds: float = 20.0,
    precision: float = 0.05,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Capacity:
    """Bisect Poisson rates between zero and the closed-loop throughput, `seconds` per trial.

    Stops when the bracket is within `precision` of its upper end. Raises RuntimeError if the server fails.
    """
    ceiling = asyncio.run(_ceiling(target, shape))
    low, high, best = 0.0, ceiling * 1.2, None
    trials: list[Trial] = []
    while high - low > precision * high:
        rate = (low + high) / 2
        result = _trial(target, shape, slo, rate, seconds, seed=len(trials))
        trial = Trial(rate, result.goodput, result.ttft_ms.get("p99", 0.0), result.tpot_ms.get("p99", 0.0))
        trials.append(trial)
        on_trial(trial)
        if result.goodput >= goodput:
            low, best = rate, result
        else:
            high = rate
        if best is None and high < ceiling / 64:
            break
    per_request = (best.prompt_tokens + best.output_tokens) / best.requests if best else 0.0
    outputs = best.output_tokens / best.requests if best else 0.0
    return Capacity(low, low * per_request, low * outputs, slo, goodput, tuple(trials))


async def _ceiling(target: Target, shape: Shape) -> float:
    """Requests/s with 32 always in flight, an upper bound for any open loop."""
    timings = await run_load(target, closed_loop(shape, 96, seed=987), concurrency=32)
    result = summarize(timings, Slo())
    if result.failed:
        raise RuntimeError(
            f"{result.failed} of {result.requests} warm-up requests failed: {result.errors[0]}"
        )
    return result.requests_per_second


def _trial(target: Target, shape: Shape, slo: Slo, rate: float, seconds: float, seed: int) -> LoadResult:
    count = max(20, round(rate * seconds))
    return summarize(asyncio.run(run_load(target, poisson(shape, rate, count, seed))), slo)
