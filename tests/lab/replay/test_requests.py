"""Single requests through the controller's loop: what no replay of rates shows.

Bursts that end, queues of a few requests on a large fleet, and a capacity that is learned meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from farthing_fleet.config import PolicyConfig
from farthing_lab.replay.requests import Controlled, Fleet, simulate
from farthing_lab.replay.servers import ReplayedRequest, Times

TIMES = Times(prefill_s=1 / 8000, base_s=0.02, share_s=0.0005, max_batch=16)
PROMPT, OUTPUT = 2000, 150


def arrivals(rate: Callable[[float], float], span_s: int, spread: float, seed: int) -> list[ReplayedRequest]:
    """Poisson arrivals of requests with log-normal prompts."""
    random, jobs = np.random.default_rng(seed), []
    for second in range(span_s):
        for at in np.sort(random.uniform(second, second + 1, random.poisson(rate(second)))):
            prompt = max(1, round(random.lognormal(math.log(PROMPT) - spread**2 / 2, spread)))
            output = max(1, round(random.exponential(OUTPUT)))
            jobs.append(ReplayedRequest(float(at), prompt, output, (), uncached=prompt))
    return jobs


def run(
    config: PolicyConfig, jobs: list[ReplayedRequest], span_s: float, start: int
) -> tuple[list[int], float]:
    """(replicas at each decision, the learned capacity at the end)."""
    scaler, counts = Controlled(config, jobs, learns=True), list[int]()
    decide = scaler.target

    def target(now: float, fleet: Fleet) -> int:
        counts.append(decide(now, fleet))
        return counts[-1]

    scaler.target = target  # type: ignore[method-assign]
    fleet = Fleet(TIMES, config.cold_start_s, TIMES.chunk(0.1))
    fleet.start(start)
    simulate(jobs, scaler, fleet, span_s)
    return counts, scaler._capacity.estimate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guess", [0.5, 1.0, 2.0])
def test_a_burst_that_ends_leaves_the_capacity_and_no_replica(guess: float, seed: int) -> None:
    """The last answers of a burst were divided by the arrivals, which had ended: a sixtieth of the truth."""
    truth = TIMES.capacity(PROMPT, OUTPUT)
    config = PolicyConfig(
        guess * truth, min_replicas=0, max_replicas=20, interval_s=5.0, cold_start_s=20.0, stale_after_s=20.0
    )
    jobs = arrivals(lambda second: 6 * truth if second < 120 else 0.0, 120, 0.5, seed)
    counts, estimate = run(config, jobs, 4200.0, 2)
    assert truth / 2.2 <= estimate <= 2.2 * truth
    assert max(counts) < 20
    assert counts[1500 // 5] <= 1 and counts[-1] == 0  # the longest window of a rule is 144 leads, an hour


@pytest.mark.parametrize("seed", range(3))
def test_a_few_waiting_requests_are_no_reason_for_a_fleet(seed: int) -> None:
    """With long prompts some request always waits behind one, however many replicas there are."""
    truth = TIMES.capacity(PROMPT, OUTPUT)
    config = PolicyConfig(truth, max_replicas=1000, interval_s=15.0, cold_start_s=60.0)
    jobs = arrivals(lambda second: 8 * truth, 900, 2.0, seed)
    counts, _ = run(config, jobs, 900.0, 10)
    assert max(counts) <= 3 * 8


@pytest.mark.parametrize("seed", range(3))
def test_a_load_that_halves_gives_replicas_back(seed: int) -> None:
    truth = TIMES.capacity(PROMPT, OUTPUT)
    config = PolicyConfig(truth, max_replicas=1000, interval_s=15.0, cold_start_s=30.0)
    jobs = arrivals(lambda second: 8 * truth if second < 600 else 2 * truth, 2400, 0.5, seed)
    counts, estimate = run(config, jobs, 2400.0, 10)
    assert 2 <= counts[-1] <= 6 < max(counts[:40]) <= 24
    assert truth / 2 <= estimate <= 2 * truth
