"""Scale replicas of the embedded model on this machine through hours of real load in a minute."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from farthing.bench.client import Target, Timing
from farthing.bench.load import LoadResult, Slo, run_load, summarize
from farthing.bench.workload import Request
from farthing.demo.levers import prompts
from farthing.demo.report import data_uri
from farthing.demo.server import free_port, running
from farthing.fleet.decisions import Decision
from farthing.fleet.replay.trace import EXAMPLE
from farthing.fleet.series import read_series

SPEED = 150  # two and a half hours in one minute
WINDOWS = 15  # of 600 s
CAPACITY = 5.0  # declared requests per second per replica
PEAK_REPLICAS = 1.7  # replicas needed at the peak, before headroom
ANSWER = 16  # tokens
# Five minutes of the policy on the demo's clock: outlasts a dip, yet shows the scale-down.
POLICY = {
    "interval_s": 1.0, "cold_start_s": 5.0, "latency_for_s": 2.0, "stale_after_s": 10.0, "drain_s": 5.0,
    "stabilization_s": 8.0, "cooldown_s": 4.0, "max_replicas": 3, "capacity": CAPACITY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FleetRun:
    """Load, replicas and decisions of one run."""

    result: LoadResult
    times: list[float]  # seconds, of each decision
    replicas: list[int]  # ready
    wanted: list[int]
    rates: list[float]  # requests per second, of each window
    reasons: list[str]  # of the decisions that changed the count

    @property
    def replica_seconds(self) -> float:
        """The integral of ready replicas between the first and the last decision."""
        steps = zip(self.times[:-1], self.times[1:], self.replicas[:-1], strict=True)
        return sum((b - a) * n for a, b, n in steps)

    @property
    def text(self) -> str:
        """A summary in sentences."""
        static = max(self.replicas) * (self.times[-1] - self.times[0])
        lines = [
            f"{self.result.requests} requests, {self.result.failed} failed, "
            f"p99 TTFT {self.result.ttft_ms.get('p99', 0):.0f} ms.",
            f"{self.replica_seconds:.0f} replica-seconds; running the peak count throughout takes "
            f"{static:.0f}.",
            *self.reasons,
        ]
        return "\n".join(lines)


def busy_hours() -> list[float]:
    """The consecutive rates of the trace with the highest peak above their first and last two, scaled so that
    the peak needs PEAK_REPLICAS."""
    rates = [float(rate) for rate in read_series(EXAMPLE).values]

    def prominence(i: int) -> float:
        part = rates[i : i + WINDOWS]
        return (max(part[2:-2]) - max(part[:2] + part[-2:])) / max(part)

    best = max(range(len(rates) - WINDOWS + 1), key=prominence)
    part = rates[best : best + WINDOWS]
    return [r / max(part) * PEAK_REPLICAS * CAPACITY for r in part]


def run_fleet(model: str, say: Callable[[str], None]) -> FleetRun:
    """Run `farthing fleet up MODEL` under the load and collect its decisions."""
    rates = busy_hours()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="farthing-fleet-") as state:
        config = Path(state) / "fleet.yaml"
        config.write_text(yaml.safe_dump({"policy": POLICY, "signals": {"window_s": 5.0, "timeout_s": 2.0}}))
        arguments = ["fleet", "up", model, "--port", str(port), "--config", str(config), "--state", state]
        arguments += ["--metrics", "127.0.0.1:0", "--serve-args", "--threads 1"]
        url = f"http://127.0.0.1:{port}"
        with running(arguments, url, 60, signal.SIGINT, 30):
            say(f"fleet is up; sending {WINDOWS * 600 // SPEED} s of load")
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
    """Plot of load and replicas over time, as a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(9, 3.2))
    edges = [i * 600 / SPEED for i in range(len(run.rates) + 1)]
    left.stairs(run.rates, edges, color="#64748b", label="requests per second", fill=True, alpha=0.3)
    left.set_xlabel("seconds (one is two and a half minutes of the trace)")
    left.set_ylabel("requests per second")
    right = left.twinx()
    right.step(run.times, run.wanted, where="post", color="#f59e0b", label="requested")
    right.step(run.times, run.replicas, where="post", color="#1d4ed8", label="replicas")
    right.set_ylim(0, 3.5)
    right.set_ylabel("replicas")
    right.legend(loc="upper left")
    figure.tight_layout()
    return data_uri(figure)
