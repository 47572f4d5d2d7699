"""The gateway's metrics, in a separate registry."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farthing_fleet.gateway.replicas import Balancer

_FIRST_BYTE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class GatewayMetrics:
    """Counters of requests and retries, the time to the first byte, and gauges read from the balancer."""

    def __init__(self, balancer: Balancer) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "farthing:gateway_requests",
            "Requests by replica and status; 499: the client disconnected.",
            ["replica", "code"],
            registry=self.registry,
        )
        self.received = Counter("farthing:gateway_received", "Requests accepted.", registry=self.registry)
        self.retries = Counter(
            "farthing:gateway_retries", "Requests sent to another replica.", registry=self.registry
        )
        self.waiting = Gauge(
            "farthing:gateway_requests_waiting",
            "Requests held until a replica is ready.",
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "farthing:gateway_first_byte_seconds",
            "Time from the complete request to the first byte of its answer.",
            buckets=_FIRST_BYTE,
            registry=self.registry,
        )
        self.registry.register(_Replicas(balancer))
        self._children: dict[tuple[str, int], Counter] = {}

    def count(self, replica: str, status: int) -> None:
        child = self._children.get((replica, status))
        if child is None:
            child = self._children[replica, status] = self._requests.labels(replica, str(status))
        child.inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _Replicas(Collector):
    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def collect(self) -> Iterable[Metric]:
        available = GaugeMetricFamily(
            "farthing:gateway_replica_available", "1 if the replica accepts requests.", labels=["replica"]
        )
        inflight = GaugeMetricFamily(
            "farthing:gateway_replica_inflight", "Requests in flight.", labels=["replica"]
        )
        for replica in self._balancer.replicas.values():
            available.add_metric([replica.name], float(replica.available))
            inflight.add_metric([replica.name], float(replica.inflight))
        return [available, inflight]
