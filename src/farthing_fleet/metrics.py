"""The controller's own Prometheus metrics and its small HTTP server: /metrics, /health, /decision."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farthing_fleet.policy import Held
from farthing_fleet.types import Decision

_INPUTS = {  # of a decision -> its gauge
    "utilization": ("farthing:fleet_target_utilization", "Target utilization of the rule in use."),
}


class FleetMetrics:
    """The last decision as gauges, and counters of decisions."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._decisions = Counter(
            "farthing:fleet_decisions",
            "Decisions by action.",
            ["action"],
            registry=self.registry,
        )
        self.failures = Counter(
            "farthing:fleet_failures",
            "Steps or fits that failed with an unexpected error.",
            registry=self.registry,
        )
        for action in ("up", "down", "hold"):
            self._decisions.labels(action)
        self.registry.register(_Last(self))
        self.last: Decision | None = None
        self._monotonic, self._shown_at = monotonic, 0.0

    def show(self, decision: Decision) -> None:
        """Set the last decision."""
        self.last, self._shown_at = decision, self._monotonic()
        self._decisions.labels(decision.action).inc()

    def age(self) -> float | None:
        """Seconds since the last decision; None before the first."""
        return self._monotonic() - self._shown_at if self.last is not None else None


class _Last(Collector):
    def __init__(self, metrics: FleetMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        decision, age = self._metrics.last, self._metrics.age()
        if decision is None or age is None:
            return
        for name, value in decision.samples().items():
            yield GaugeMetricFamily(name, "Value of the last decision.", value=value)
        yield GaugeMetricFamily(
            "farthing:fleet_decision_age_seconds", "Time since the last decision.", value=age
        )
        kinds = GaugeMetricFamily("farthing:fleet_alarm", "1 for each kind of alarm raised.", labels=["kind"])
        for kind in sorted({alarm.partition(":")[0] for alarm in decision.alarms}):
            kinds.add_metric([kind], 1.0)
        yield kinds
        for key, (name, text) in _INPUTS.items():
            if key in decision.inputs:
                yield GaugeMetricFamily(name, text, value=decision.inputs[key])
        snapshot = decision.inputs.get("snapshot", {})
        if snapshot.get("cold_start_s") is not None:
            text = "P90 of the time from launch to ready."
            yield GaugeMetricFamily("farthing:fleet_cold_start_seconds", text, value=snapshot["cold_start_s"])


class MetricsServer:
    """Serves a controller's metrics. Healthy while its decisions are younger than `max_age_s`."""

    def __init__(self, metrics: FleetMetrics, max_age_s: float = 120.0, held: Held | None = None) -> None:
        """held: receives the gateways' reports on /wake."""
        self._metrics, self._max_age, self._held = metrics, max_age_s, held
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Start serving; returns the port. Raises OSError if it is in use."""
        app = web.Application()
        app.router.add_get("/metrics", self._render)
        app.router.add_get("/health", self._health)
        app.router.add_get("/decision", self._decision)
        if self._held is not None:
            app.router.add_post("/wake", self._wake)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _render(self, request: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"content-type": "text/plain; version=0.0.4"})

    async def _health(self, request: web.Request) -> web.Response:
        age = self._metrics.age()
        good = age is None or age <= self._max_age  # None: just started
        return web.json_response(
            {"status": "ok" if good else f"no decision for {age:.0f} s"}, status=200 if good else 503
        )

    async def _decision(self, request: web.Request) -> web.Response:
        last = self._metrics.last
        if last is None:
            return web.json_response({"error": "no decision yet"}, status=404)
        return web.json_response(json.loads(last.to_json()))

    async def _wake(self, request: web.Request) -> web.Response:
        """Receive a gateway's number of held requests: {"gateway": NAME, "waiting": N}."""
        assert self._held is not None
        try:
            report = await request.json()
            self._held.report(str(report["gateway"])[:100], int(report["waiting"]))
        except (ValueError, KeyError, TypeError) as problem:
            message = f'expected {{"gateway": NAME, "waiting": N}} ({problem!r})'
            return web.json_response({"error": message}, status=400)
        return web.Response(status=204)
