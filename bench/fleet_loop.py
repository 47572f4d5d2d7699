"""How fast the fleet reacts: from a backlog to the scale request, and from a decision to a ready replica.

The first is measured from the moment a server's metrics show waiting requests until the Kubernetes API
receives the patch of /scale, over real HTTP on both sides, with the settings of local mode: one turn per
second. The second starts replicas of the embedded model with `farthing serve`, as `farthing fleet up` does.
Limit: the printed "import torch" is the time of a Python process that only imports torch.

    python bench/fleet_loop.py [--runs 5] [--json]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from farthing_fleet.actuators.kubernetes import ScalePatch, Target, connect
from farthing_fleet.actuators.local import LocalConfig, LocalReplicas
from farthing_fleet.config import PolicyConfig, SignalsConfig
from farthing_fleet.controller import Controller
from farthing_fleet.policy import Policy
from farthing_fleet.signals_scrape import ScrapeSource
from farthing_fleet.up import STANDBY, serve_command
from harness import in_turns, parser, report


class World:
    """A server's /metrics with a controllable queue, and the /scale that is patched for it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.queued_at: float | None = None
        self.patched_at: float | None = None
        self.replicas = 4

    async def metrics(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        good = 10 * (now - self.began)  # requests, at 10 per second
        waited = 0.01 * good
        names = {
            "vllm:num_requests_running": 5,
            "vllm:num_requests_waiting": 200 if self.queued_at else 0,
            "vllm:request_queue_time_seconds_sum": waited,
            "vllm:request_queue_time_seconds_count": good,
            "vllm:time_to_first_token_seconds_sum": waited,
            "vllm:time_to_first_token_seconds_count": good,
        }
        return web.Response(text="".join(f"{name} {value}\n" for name, value in names.items()))

    async def scale(self, request: web.Request) -> web.Response:
        if request.method == "PATCH":
            self.replicas = (await request.json())["spec"]["replicas"]
            self.patched_at = self.patched_at or time.monotonic()
        spec = {"replicas": self.replicas}
        about = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": {"name": "d", "namespace": "n"}}
        return web.json_response(about | {"spec": spec, "status": spec})


async def backlog_to_request(interval: float) -> float:
    """Seconds from the backlog to the patch."""
    world = World()
    app = web.Application()
    app.router.add_get("/metrics", world.metrics)
    app.router.add_route("*", "/apis/apps/v1/namespaces/n/deployments/d/scale", world.scale)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    policy = PolicyConfig(capacity=16.0, interval_s=interval, cold_start_s=5.0, stale_after_s=10.0)
    with tempfile.TemporaryDirectory() as folder:
        signals = SignalsConfig(window_s=5.0)
        source = ScrapeSource(lambda: dict.fromkeys("abcd", url), signals, latency_window_s=2.0)
        actuator = ScalePatch(connect(url), Target.parse("deployment/d", "n"))
        controller = Controller(Policy(policy), source, actuator, log_path=Path(folder) / "d.jsonl")
        stop = asyncio.Event()
        task = asyncio.create_task(controller.run(stop))
        await asyncio.sleep(6.0 + random.uniform(0, interval))  # a full window of good values, and any phase
        assert world.patched_at is None, "scaled before the backlog"
        world.queued_at = time.monotonic()
        while world.patched_at is None:
            await asyncio.sleep(0.01)
        stop.set()
        await task
        await source.close()
    await runner.cleanup()
    return world.patched_at - world.queued_at


async def decision_to_ready() -> tuple[float, float]:
    """Seconds from the request for a replica of the embedded model until it is ready: first and second."""
    with tempfile.TemporaryDirectory() as folder:
        config = LocalConfig(serve_command("mite"), Path(folder), health_path="/ready", failures=1, **STANDBY)
        replicas = LocalReplicas(config)
        await replicas.start()
        taken = []
        for count in (1, 2):
            began = time.monotonic()
            await replicas.scale(count)
            good = await replicas.wait_ready(count, 120.0)
            taken.append(time.monotonic() - began)
            if not good:
                raise RuntimeError(f"the replica did not become ready: {replicas.given_up}")
            await asyncio.sleep(8.0)  # the spare process finishes its imports
        await replicas.close()
    return taken[0], taken[1]


def import_torch() -> float:
    """Seconds of a process that imports torch and exits: the lower bound for a replica in Python."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--interval", type=float, default=1.0, help="seconds between decisions")
    a = p.parse_args()
    replicas: list[tuple[float, float]] = []  # of each run: the first replica, and the second

    def start() -> float:
        replicas.append(asyncio.run(decision_to_ready()))
        return replicas[-1][1]

    runs: dict[str, Callable[[], float]] = {
        "backlog to request": lambda: asyncio.run(backlog_to_request(a.interval)),
        "decision to ready": start,
        "import torch": import_torch,
    }
    found = in_turns(runs, a.runs, 0) | {"first replica ready": [first for first, _ in replicas]}
    rows = [(name, statistics.median(values), max(values)) for name, values in found.items()]
    report(found, a.json, f"{a.runs} runs, interleaved", ("", "median, s", "worst, s"), rows)


if __name__ == "__main__":
    main()
