"""The load of a pool: requests, what they cost a replica of each kind, and capacities computed from that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from farthing.fleet.replay.servers import Job, Times
from farthing.fleet.replay.trace import RequestTrace

RECENT_S = 300.0  # of the requests from which the capacity is computed
LAYOUTS = {"one pool": ("whole",), "two pools": ("prefill", "decode")}


@dataclass(frozen=True)
class PoolsConfig:
    """Targets and service of a comparison of pools."""

    ttft_s: float = 10.0
    tpot_s: float = 0.1
    slo: float = 0.99  # share of the requests that meet both, for the tuned utilizations and the oracle
    copies: int = 1  # of the trace, each shifted by up to 30 s and with prompts of its own
    times: Times = field(default_factory=Times)
    chunk_s: float | None = None  # time of an iteration with a chunk and a full batch; default: tpot_s

    @property
    def chunk(self) -> int:
        """Prompt tokens per iteration of a replica that also generates."""
        return self.times.chunk(self.chunk_s if self.chunk_s is not None else self.tpot_s)

    def __post_init__(self) -> None:
        least = self.times.step_s(self.times.max_batch)
        if not self.ttft_s > 0:
            raise ValueError(f"ttft: got {self.ttft_s}; expected a number above 0")
        if not self.tpot_s > least:
            raise ValueError(
                f"tpot: got {self.tpot_s}; expected more than {least:g} s, an iteration of a full batch"
            )
        if not 0 < self.slo < 1:
            raise ValueError(f"slo: got {self.slo}; expected a number in (0, 1)")
        if self.copies < 1:
            raise ValueError(f"copies: got {self.copies}; expected 1 or more")


def cost_s(kind: str, config: PoolsConfig, job: Job) -> float:
    """Replica-seconds that a request costs at full load."""
    times, prompt = config.times, job.uncached
    generate = job.output * times.step_s(times.max_batch) / times.max_batch
    if kind == "decode":
        return generate
    if kind == "prefill":
        return times.base_s + prompt * times.prefill_s
    mixed = prompt / config.chunk  # iterations with a chunk, each of which also generates
    alone = max(0.0, job.output - mixed * times.max_batch)
    each = times.step_s(times.max_batch) + config.chunk * times.prefill_s
    return mixed * each + alone * times.step_s(times.max_batch) / times.max_batch


class Recent:
    """Mean cost of recent requests in each pool, as a controller learns it."""

    def __init__(self, config: PoolsConfig, first: Iterable[Job]) -> None:
        self._config = config
        self._jobs = deque(first)  # until others arrive: the requests the fleet was sized for

    def add(self, now: float, job: Job) -> None:
        self._jobs.append(job)
        while self._jobs[0].arrival < now - RECENT_S:
            self._jobs.popleft()

    def capacity(self, kind: str) -> float:
        """Requests per second of one replica."""
        return len(self._jobs) / sum(cost_s(kind, self._config, job) for job in self._jobs)


def expected_hours(jobs: Sequence[Job], kinds: tuple[str, ...], config: PoolsConfig, u: float) -> float:
    """Replica-hours that the requests need in these pools at utilization `u`: whole replicas, at least one
    per pool, in windows of `RECENT_S`. Without caches, queues and cold starts.
    """
    at = np.array([job.arrival for job in jobs])
    windows = (at // RECENT_S).astype(np.int64)
    total = 0.0
    for kind in kinds:
        work = np.bincount(windows, weights=[cost_s(kind, config, job) for job in jobs])
        total += float(np.maximum(1.0, np.ceil(work / (RECENT_S * u))).sum())
    return total * RECENT_S / 3600


def advised(jobs: Sequence[Job], config: PoolsConfig, u: float) -> str:
    """The layout that needs fewer replica-hours; one pool if both need the same."""
    return min(LAYOUTS, key=lambda layout: expected_hours(jobs, LAYOUTS[layout], config, u))


def arrivals(trace: RequestTrace, copies: int, seed: int = 0) -> list[Job]:
    """The requests of `copies` users of the same service, by arrival."""
    random, jobs = np.random.default_rng(seed), []
    for copy in range(copies):
        shift = random.uniform(0, 30) if copy else 0.0
        for index, at in enumerate(trace.arrival_s):
            blocks = tuple((copy << 40) + block for block in trace.blocks[index]) if trace.blocks else ()
            prompt, output = int(trace.prompt_tokens[index]), int(trace.output_tokens[index])
            jobs.append(Job(float(at) + shift, prompt, output, blocks, uncached=prompt))
    return sorted(jobs, key=lambda job: job.arrival)
