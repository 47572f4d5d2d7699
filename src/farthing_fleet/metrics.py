"""The controller's own Prometheus metrics and its small HTTP server: /metrics, /health, /decision."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farthing_fleet.policy import Held
from farthing_fleet.types import Decision

_MOST = 64 << 10  # bytes of a request's body
_MOST_WAITING = 1_000_000  # requests that a gateway reports; more is a mistake


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
        if (used := decision.inputs.get("utilization")) is not None:
            text = "Target utilization of the rule in use."
            yield GaugeMetricFamily("farthing:fleet_target_utilization", text, value=used)
        snapshot = decision.inputs.get("snapshot", {})
        if snapshot.get("cold_start_s") is not None:
            text = "P90 of the time from launch to ready."
            yield GaugeMetricFamily("farthing:fleet_cold_start_seconds", text, value=snapshot["cold_start_s"])


class MetricsServer:
    """Serves a controller's metrics. Healthy while its decisions are younger than `max_age_s`.

    The standard library's server, in threads: aiohttp would be a quarter of the controller's memory.
    """

    def __init__(self, metrics: FleetMetrics, max_age_s: float = 120.0, held: Held | None = None) -> None:
        """held: receives the gateways' reports on /wake."""
        self._metrics, self._max_age, self._held = metrics, max_age_s, held
        self._server: ThreadingHTTPServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, host: str, port: int) -> int:
        """Start serving; returns the port. Raises OSError if it is in use."""
        self._loop = asyncio.get_running_loop()
        server = _Server6 if ":" in host else _Server
        try:
            self._server = server((host.strip("[]"), port), partial(_Handler, self.answer))
        except OSError as problem:
            why = f"metrics: cannot listen on {host}:{port}: {problem.strerror}"
            raise OSError(problem.errno, why) from problem
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return int(self._server.server_address[1])

    async def close(self) -> None:
        if self._server is not None:
            await asyncio.to_thread(self._server.shutdown)
            self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, content type and body of an answer. Called in threads."""
        if path == "/metrics" and method == "GET":
            return 200, "text/plain; version=0.0.4", generate_latest(self._metrics.registry)
        status, document = 404, {"error": f"{method} {path}: no such page"}
        if path == "/health" and method == "GET":
            status, document = self._health()
        elif path == "/decision" and method == "GET":
            last = self._metrics.last
            if last is not None:
                return 200, "application/json", last.to_json().encode()
            document = {"error": "no decision yet"}
        elif path == "/wake" and method == "POST" and self._held is not None:
            status, document = self._wake(body)
        return status, "application/json", json.dumps(document).encode()

    def _health(self) -> tuple[int, dict[str, Any]]:
        age = self._metrics.age()
        if age is None or age <= self._max_age:  # None: just started
            return 200, {"status": "ok"}
        return 503, {"status": f"no decision for {age:.0f} s"}

    def _wake(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Receive a gateway's number of held requests: {"gateway": NAME, "waiting": N}."""
        try:
            report = json.loads(body)
            told = self._report(str(report["gateway"])[:100], min(int(report["waiting"]), _MOST_WAITING))
            assert self._loop is not None
            asyncio.run_coroutine_threadsafe(told, self._loop).result()
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as problem:
            return 400, {"error": f'expected {{"gateway": NAME, "waiting": N}} ({problem!r})'}
        return 200, {"status": "ok"}

    async def _report(self, gateway: str, waiting: int) -> None:
        assert self._held is not None
        self._held.report(gateway, waiting)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        """As the base's, without its reverse look-up of the address."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Without a traceback for a client that has left."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10.0  # seconds for each read

    def __init__(self, answer: Callable[[str, str, bytes], tuple[int, str, bytes]], *rest: Any) -> None:
        self._answer = answer
        super().__init__(*rest)

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length", "0")
        size = min(int(length), _MOST) if length.isascii() and length.isdigit() else 0
        self.close_connection |= str(size) != length  # what is left is not another request
        status, kind, body = self._answer(self.command, self.path.partition("?")[0], self.rfile.read(size))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """No access log."""
