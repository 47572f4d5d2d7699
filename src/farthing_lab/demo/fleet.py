"""Scale replicas of the embedded model through hours of real load in a minute."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from farthing.bench.load import Request, Slo, Target, Timing, run_load, summarize
from farthing.upstream import free_port
from farthing_fleet.types import Decision
from farthing_lab.demo.levers import prompts
from farthing_lab.demo.processes import Say, Watch, running
from farthing_lab.replay.trace import EXAMPLE
from farthing_lab.series import read_series

SPEED = 150  # two and a half hours a minute
WINDOWS = 20  # of 600 s
QUIET = 6  # of them at the end, long enough for the fleet to scale down
CAPACITY = 5.0  # declared requests per second per replica
PEAK_REPLICAS = 1.7  # replicas needed at the peak, before headroom
ANSWER = 16  # tokens
HEIGHT = 240  # of the picture, where its width is 1,000
# Five minutes of the policy on the demo's clock. The default rule plans by means of one and of three minutes,
# most of the load here, and never scales down: the published rule does.
POLICY = {
    "rule": "published", "interval_s": 1.0, "cold_start_s": 5.0, "stale_after_s": 10.0, "drain_s": 5.0,
    "cooldown_s": 4.0, "max_replicas": 3, "capacity": CAPACITY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FleetRun:
    """Load, replicas and decisions of one run."""

    requests: int
    failed: int
    p99_ttft_ms: float
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
            "Settings: " + ", ".join(f"{name} {value}" for name, value in POLICY.items()),
            f"{self.requests} requests, {self.failed} failed, p99 TTFT {self.p99_ttft_ms:,.0f} ms.",
            f"{self.replica_seconds:.0f} replica-seconds; running the peak count throughout takes "
            f"{static:.0f}.",
            *self.reasons,
        ]
        return "\n".join(lines)


def busy_hours() -> list[float]:
    """The consecutive rates of the trace with the highest peak above their first two and last QUIET, scaled
    so that the peak needs PEAK_REPLICAS."""
    rates = [float(rate) for rate in read_series(EXAMPLE).values]

    def prominence(i: int) -> float:
        part = rates[i : i + WINDOWS]
        return (max(part[2:-QUIET]) - max(part[:2] + part[-QUIET:])) / max(part)

    best = max(range(len(rates) - WINDOWS + 1), key=prominence)
    part = rates[best : best + WINDOWS]
    return [r / max(part) * PEAK_REPLICAS * CAPACITY for r in part]


def run_fleet(model: str, say: Say) -> FleetRun:
    """Run `farthing fleet up MODEL` under the load and collect its decisions."""
    rates = busy_hours()
    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="farthing-fleet-") as state:
        config = Path(state) / "fleet.yaml"
        config.write_text(yaml.safe_dump({"policy": POLICY, "signals": {"window_s": 5.0, "timeout_s": 2.0}}))
        arguments = ["fleet", "up", model, "--port", str(port), "--config", str(config), "--state", state]
        arguments += ["--metrics", "127.0.0.1:0", "--serve-args", "--threads 1"]
        url = f"http://127.0.0.1:{port}"
        with running(arguments, url, say, signal.SIGINT) as process:
            say(f"fleet is up; sending {WINDOWS * 600 // SPEED} s of load")
            began = time.time()
            watch = Watch("the fleet", process.pid, say)
            timings = asyncio.run(_load(Target(url, "mite", timeout=3600), rates, watch))
        lines = [line for f in Path(state).glob("**/decisions.jsonl") for line in f.read_text().splitlines()]
    decisions = [d for d in map(Decision.from_json, lines) if d.time >= began]
    result = summarize(timings, Slo())
    return FleetRun(
        requests=result.requests,
        failed=result.failed,
        p99_ttft_ms=result.ttft_ms.get("p99", 0.0),
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


async def _load(target: Target, rates: list[float], watch: Watch) -> list[Timing]:
    rng, texts, workload = random.Random(0), prompts(64, seed=3), []
    width = 600 / SPEED
    for i, rate in enumerate(rates):
        at = i * width
        while (at := at + rng.expovariate(rate)) < (i + 1) * width:
            workload.append(Request(at, rng.choice(texts), ANSWER))
    task = asyncio.ensure_future(run_load(target, workload, ignore_eos=True))
    while not (await asyncio.wait([task], timeout=5))[0]:
        watch.look()
    return task.result()


def picture(run: FleetRun) -> str:
    """Load and replicas over time, as SVG."""
    width, end = 600 / SPEED, max(WINDOWS * 600 / SPEED, run.times[-1])

    def steps(times: list[float], values: Sequence[float], most: float) -> str:
        points = [f"0,{HEIGHT}"]
        for at, until, value in zip(times, [*times[1:], end], values, strict=True):
            y = HEIGHT * (1 - value / most)
            points += [f"{1000 * at / end:.1f},{y:.1f}", f"{1000 * until / end:.1f},{y:.1f}"]
        return " ".join(points)

    most = max(*run.replicas, *run.wanted) + 0.5
    load = steps([i * width for i in range(len(run.rates))], run.rates, max(run.rates) * 1.1)
    wanted, ready = steps(run.times, run.wanted, most), steps(run.times, run.replicas, most)
    lines = (
        f"<polyline points='{load} 1000,{HEIGHT}' fill='var(--grid)'/>"
        f"<polyline points='{wanted}' fill='none' stroke='var(--s2)'/>"
        f"<polyline points='{ready}' fill='none' stroke='var(--s1)' stroke-width='3'/>"
    )
    label = f"the load, at most {max(run.rates):.1f} requests per second; replicas asked for and ready"
    return f"<svg viewBox='0 0 1000 {HEIGHT}' role=img aria-label='{label}'>{lines}</svg><p>{label}</p>"
