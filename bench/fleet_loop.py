"""How fast the fleet reacts: from a backlog to the scale request, and from a decision to a ready replica.

The first is measured from the moment a server's metrics show waiting requests until the Kubernetes API
receives the patch of /scale, over real HTTP on both sides, with the settings of local mode: one turn per
second. The second starts replicas of the embedded model with `farthing serve`, as `farthing fleet up` does.
Limit: the printed "import torch" is the time of a Python process that only imports torch.

    python bench/fleet_loop.py [--runs 5] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from farthing_fleet.actuators.kubernetes import ScalePatch, Target, connect
from farthing_fleet.actuators.local import LocalConfig, LocalReplicas
from farthing_fleet.config import PolicyConfig, SignalsConfig
from farthing_fleet.controller import Controller
from farthing_fleet.policy import Policy
from farthing_fleet.signals_scrape import ScrapeSource
from farthing_fleet.up import STANDBY, serve_command


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
        metadata = {"name": "d", "namespace": "n"}
        spec = {"replicas": self.replicas}
        return web.json_response(
            {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "metadata": metadata,
                "spec": spec,
                "status": spec,
            }
        )


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between decisions")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = ("backlog to request", "first replica ready", "decision to ready", "import torch")
    rows: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.runs):
        rows["backlog to request"].append(asyncio.run(backlog_to_request(arguments.interval)))
        first, second = asyncio.run(decision_to_ready())
        rows["first replica ready"].append(first)
        rows["decision to ready"].append(second)
        rows["import torch"].append(import_torch())
    result: dict[str, Any] = {
        name: {"median_s": statistics.median(values), "worst_s": max(values)} for name, values in rows.items()
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{arguments.runs} runs, interleaved (seconds)")
    for name, row in result.items():
        print(f"{name:20} median {row['median_s']:6.2f}   worst {row['worst_s']:6.2f}")


if __name__ == "__main__":
    main()
