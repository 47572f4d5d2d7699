"""The seven synthetic workloads of Planner Gym (ai-dynamo, gyms/planner-gym), against its KEDA defaults.

Three minutes of requests each, a cold start of 30 s, one replica at the start and at most eight. A request
is good if its first token comes within 2 s and its mean time per output token is at most 50 ms. The score is
good requests per replica-second. The replica is this package's (`servers`), with times like those of a large
mixture on one GPU; figures are not comparable with the gym's own, only with each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from farthing_fleet.config import PolicyConfig, SloConfig
from farthing_lab.replay.requests import Controlled, Fleet, Scaler, simulate
from farthing_lab.replay.servers import ReplayedRequest, Times
from farthing_lab.replay.trace import BLOCK

SPAN_S, COLD_START_S, MOST = 180.0, 30.0, 8
TTFT_S, TPOT_S = 2.0, 0.05
TIMES = Times(prefill_s=1 / 40_000, base_s=0.005, share_s=0.0001, max_batch=128)
CHUNK = TIMES.chunk(TPOT_S)  # prompt tokens per iteration
SHAPES = {  # medians and log deviations of prompt and output tokens
    "prefill": (6000, 0.8, 34, 0.5),
    "decode": (200, 0.5, 600, 0.5),
    "balanced": (1000, 0.5, 200, 0.5),
}


@dataclass(frozen=True)
class Workload:
    """Arrivals per second over time, the shape of a request, and leading blocks that all requests share."""

    rate: Callable[[float], float]
    shape: str = "prefill"
    shared: int = 0

    def requests(self, seed: int) -> list[ReplayedRequest]:
        """The requests, by arrival."""
        random, jobs, following = np.random.default_rng(seed), [], 10_000
        prompt, prompt_spread, output, output_spread = SHAPES[self.shape]
        for second in range(round(SPAN_S)):
            for at in np.sort(random.uniform(second, second + 1, random.poisson(self.rate(second)))):
                tokens = max(1, round(random.lognormal(math.log(prompt), prompt_spread)))
                generated = max(1, round(random.lognormal(math.log(output), output_spread)))
                count = -(-tokens // BLOCK)
                blocks = (*range(min(self.shared, count)), *range(following, following + count - self.shared))
                following += count
                jobs.append(ReplayedRequest(float(at), tokens, generated, blocks, uncached=tokens))
        return jobs


def _stairs(second: float) -> float:
    return 1.0 + second // 20


WORKLOADS = {
    "flat": Workload(lambda second: 5.6),
    "staircase": Workload(_stairs),
    "square wave": Workload(lambda second: 10.0 if second % 40 < 20 else 1.0),
    "flash crowd": Workload(lambda second: 30.0 if 80 <= second < 95 else 3.0),
    "diurnal": Workload(lambda second: 5.6 + 4 * math.sin(2 * math.pi * second / SPAN_S)),
    "decode heavy": Workload(_stairs, "decode"),
    "shared prefix": Workload(lambda second: 5.6, "balanced", 8),
}


@dataclass
class Keda:
    """KEDA's Prometheus scaler and HPA v2 with the defaults that the gym publishes: waiting requests, 5 per
    replica, every 15 s, tolerance 0.1, scale-up by the larger of 4 and 100 %, scale-down after 300 s.
    """

    interval_s: float = 15.0
    threshold: float = 5.0
    _recent: deque[int] = field(default_factory=lambda: deque(maxlen=20))

    def target(self, now: float, fleet: Fleet) -> int:
        current, waiting = max(1, fleet.current), fleet.backlog
        steady = abs(waiting / current / self.threshold - 1) <= 0.1
        wanted = current if steady else math.ceil(waiting / self.threshold)
        self._recent.append(wanted)
        if wanted > current:
            wanted = min(wanted, current + max(4, current))
        elif wanted < current:
            wanted = min(current, max(self._recent))
        return min(max(wanted, 1), MOST)


@dataclass(frozen=True)
class Score:
    """Outcome of a workload."""

    good: float  # share of the requests
    per_replica_second: float  # good requests
    replicas: float  # mean


def ours(jobs: list[ReplayedRequest]) -> Scaler:
    """The controller with its defaults, a decision every 5 s, and the capacity of the mean request."""
    prompt, output = (float(np.mean([getattr(job, name) for job in jobs])) for name in ("prompt", "output"))
    config = PolicyConfig(
        capacity=TIMES.capacity(prompt, output),
        interval_s=5.0,
        cold_start_s=COLD_START_S,
        max_replicas=MOST,
        slo=SloConfig(ttft_s=TTFT_S, tpot_s=TPOT_S),
    )
    return Controlled(config, jobs, learns=True)


Made = Callable[[list[ReplayedRequest]], Scaler]
SCALERS: dict[str, Made] = {"farthing": ours, "keda": lambda jobs: Keda()}


def score(workload: Workload, scaler: str, seed: int = 0) -> Score:
    """Run one workload."""
    jobs = workload.requests(seed)
    fleet = Fleet(TIMES, COLD_START_S, CHUNK)
    fleet.start(1)
    billed = simulate(jobs, SCALERS[scaler](jobs), fleet, SPAN_S)
    good = sum(job.ttft_s <= TTFT_S and job.tpot_s <= TPOT_S for job in fleet.done)
    return Score(good / len(jobs), good / billed, billed / SPAN_S)
