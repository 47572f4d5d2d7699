"""The gateway's metrics, in a separate registry."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farthing_fleet.gateway.replicas import Balancer

_REPLICA = ["model_name", "replica"]
_FIRST_BYTE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class GatewayMetrics:
    """Counters of requests and retries, the time to the first byte, and gauges read from the balancer."""

    def __init__(self, balancer: Balancer) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "farthing:gateway_requests",
            "Requests by replica and status; 499: the client disconnected.",
            ["model_name", "replica", "code"],
            registry=self.registry,
        )
        self.received = Counter("farthing:gateway_received", "Requests accepted.", registry=self.registry)
        self.retries = Counter(
            "farthing:gateway_retries", "Requests sent to another replica.", registry=self.registry
        )
        self.waiting = Gauge(
            "farthing:gateway_requests_waiting",
            "Requests held until a replica is ready.",
            ["model_name"],
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "farthing:gateway_first_byte_seconds",
            "Time from the complete request to the first byte of its answer.",
            ["model_name"],
            buckets=_FIRST_BYTE,
            registry=self.registry,
        )
        self.waiting.labels("")  # shown before the first request
        self.first_byte.labels("")
        self.registry.register(_Replicas(balancer))
        self._children: dict[tuple[str, str, int], Counter] = {}

    def count(self, pool: str, replica: str, status: int) -> None:
        """Count an answered request."""
        key = pool, replica, status
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(pool, replica, str(status))
        child.inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _Replicas(Collector):
    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def collect(self) -> Iterable[Metric]:
        available = GaugeMetricFamily(
            "farthing:gateway_replica_available", "1 if the replica accepts requests.", labels=_REPLICA
        )
        inflight = GaugeMetricFamily(
            "farthing:gateway_replica_inflight", "Requests in flight.", labels=_REPLICA
        )
        for replica in self._balancer.replicas.values():
            available.add_metric([replica.pool, replica.name], float(replica.available))
            inflight.add_metric([replica.pool, replica.name], float(replica.inflight))
        return [available, inflight]
