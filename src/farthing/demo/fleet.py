"""Scale replicas of the embedded model on this machine over an hour of real load, sixty times as fast."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from farthing.bench.client import Target, Timing
from farthing.bench.load import LoadResult, Slo, run_load, summarize
from farthing.bench.workload import Request
from farthing.demo.levers import prompts
from farthing.demo.report import data_uri
from farthing.demo.server import free_port, running
from farthing.fleet.decisions import Decision
from farthing.fleet.replay.trace import EXAMPLE
from farthing.fleet.series import read_series

SPEED = 60  # an hour in a minute
WINDOWS = 6  # of 600 s
CAPACITY = 3.0  # requests a second that one replica is declared to sustain
PEAK_REPLICAS = 1.7  # what the hour's peak needs at that capacity, before head-room
ANSWER = 16


@dataclass(frozen=True, slots=True)
class FleetRun:
    """What the minute brought."""

    result: LoadResult
    times: list[float]  # seconds, of each decision
    replicas: list[int]  # that were up
    wanted: list[int]
    rates: list[float]  # requests a second, of each window
    reasons: list[str]  # of the decisions that changed something

    @property
    def replica_seconds(self) -> float:
        """Replicas times time, as far as decisions tell."""
        steps = zip(self.times[:-1], self.times[1:], self.replicas[:-1], strict=True)
        return sum((b - a) * n for a, b, n in steps)

    @property
    def text(self) -> str:
        """In words."""
        static = max(self.replicas) * (self.times[-1] - self.times[0])
        lines = [
            f"{self.result.requests} requests, {self.result.failed} failed, "
            f"p99 TTFT {self.result.ttft_ms.get('p99', 0):.0f} ms",
            f"replica-seconds: {self.replica_seconds:.0f}; at the peak's count all the time: {static:.0f}",
            *self.reasons,
        ]
        return "\n".join(lines)


def hour_of_growth() -> list[float]:
    """Six consecutive rates of the trace that rise the most, scaled so that the peak needs PEAK_REPLICAS."""
    rates = [float(rate) for rate in read_series(EXAMPLE).values]
    best = max(range(len(rates) - WINDOWS + 1), key=lambda i: rates[i + WINDOWS - 1] - rates[i])
    hour = rates[best : best + WINDOWS]
    return [r / max(hour) * PEAK_REPLICAS * CAPACITY for r in hour]


def run_fleet(model: str, say: Callable[[str], None]) -> FleetRun:
    """`farthing fleet up MODEL` under the hour, then its decisions."""
    rates = hour_of_growth()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="farthing-fleet-") as state:
        arguments = ["fleet", "up", model, "--port", str(port), "--max-replicas", "3"]
        arguments += ["--capacity", str(CAPACITY), "--state", state]
        arguments += ["--metrics", "127.0.0.1:0", "--serve-args", "--threads 1"]
        url = f"http://127.0.0.1:{port}"
        with running(arguments, url, 60, signal.SIGINT, 30):
            say(f"fleet is up; {WINDOWS * 600 // SPEED} s of load begin")
            began = time.time()
            timings = asyncio.run(_load(Target(url, "mite"), rates))
        lines = [line for f in Path(state).glob("**/decisions.jsonl") for line in f.read_text().splitlines()]
    decisions = [d for d in map(Decision.from_json, lines) if d.time >= began]
    return FleetRun(
        result=summarize(timings, Slo()),
        times=[d.time - began for d in decisions],
        replicas=[d.current for d in decisions],
        wanted=[d.target for d in decisions],
        rates=rates,
        reasons=[
            f"{d.time - began:5.1f} s  {d.current} -> {d.target}: {d.reason}"
            for d in decisions
            if d.target != d.current
        ],
    )


async def _load(target: Target, rates: list[float]) -> list[Timing]:
    rng, texts, workload = random.Random(0), prompts(64, seed=3), []
    width = 600 / SPEED
    for i, rate in enumerate(rates):
        at = i * width
        while (at := at + rng.expovariate(rate)) < (i + 1) * width:
            workload.append(Request(at, rng.choice(texts), ANSWER))
    return await run_load(target, workload, ignore_eos=True)


def picture(run: FleetRun) -> str:
    """Load and replicas over the minute, as a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(9, 3.2))
    edges = [i * 600 / SPEED for i in range(len(run.rates) + 1)]
    left.stairs(run.rates, edges, color="#64748b", label="requests a second", fill=True, alpha=0.3)
    left.set_xlabel("seconds (one is a minute of the trace)")
    left.set_ylabel("requests a second")
    right = left.twinx()
    right.step(run.times, run.wanted, where="post", color="#f59e0b", label="wanted")
    right.step(run.times, run.replicas, where="post", color="#1d4ed8", label="replicas")
    right.set_ylim(0, 3.5)
    right.set_ylabel("replicas")
    right.legend(loc="upper left")
    figure.tight_layout()
    return data_uri(figure)
