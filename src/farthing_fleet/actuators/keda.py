"""The KEDA external scaler: KEDA polls a metric and its target over gRPC and scales by their quotient.

`scalerMetadata` of the ScaledObject selects `metric` (desired_replicas by default, queue_backlog or
average_response_time) and, for the last two, `target` (the value per replica). For desired_replicas the
target is 1, so KEDA's quotient equals our number. A missing or outdated metric is an UNAVAILABLE error, on
which KEDA holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from farthing_fleet.actuators.base import METRICS, LastDecision

# KEDA's external-scaler protocol, compiled by grpcio-tools from `externalscaler.proto` at import.

_PROTO = "farthing_fleet/actuators/externalscaler.proto"  # as found on sys.path

messages: Any
services: Any
messages, services = grpc.protos_and_services(_PROTO)


log = logging.getLogger(__name__)

_WATCH_S = 0.5  # between checks of the last decision in StreamIsActive


class KedaScaler(services.ExternalScalerServicer):  # type: ignore[misc]
    """The gRPC service."""

    def __init__(self, last_decision: LastDecision) -> None:
        self._last = last_decision
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, credentials: Any = None) -> int:
        """Serve on HOST:PORT, with TLS if grpc server credentials are given. Returns the port.

        Raises OSError if the address cannot be bound.
        """
        self._server = grpc.aio.server()
        services.add_ExternalScalerServicer_to_server(self, self._server)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as problem:  # grpc's text is a page of status codes
            await self.close()
            raise OSError(f"keda.address: cannot listen on {address}") from problem
        await self._server.start()
        return int(port)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=1.0)
            self._server = None

    # ---- the calls ----

    async def IsActive(self, request: Any, context: Any) -> Any:
        """Whether the target is at least one replica."""
        return messages.IsActiveResponse(result=await self._value("desired_replicas", context) > 0)

    async def StreamIsActive(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Stream the current answer, then each change. Sends nothing while there is no decision."""
        said: bool | None = None
        while not context.cancelled():
            value = self._last.value("desired_replicas")
            active = value > 0 if value is not None else said
            if active is not None and active != said:
                said = active
                yield messages.IsActiveResponse(result=active)
            await asyncio.sleep(_WATCH_S)

    async def GetMetricSpec(self, request: Any, context: Any) -> Any:
        metric, target = await self._asked(request, context)
        spec = messages.MetricSpec(
            metricName=metric, targetSize=max(1, round(target)), targetSizeFloat=target
        )
        return messages.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: Any, context: Any) -> Any:
        metric, _ = await self._asked(request.scaledObjectRef, context)
        value = await self._value(metric, context)
        answer = messages.MetricValue(metricName=metric, metricValue=round(value), metricValueFloat=value)
        return messages.GetMetricsResponse(metricValues=[answer])

    async def _asked(self, reference: Any, context: Any) -> tuple[str, float]:
        """(metric, target per replica) from a ScaledObject's metadata; aborts with INVALID_ARGUMENT."""
        metadata = dict(reference.scalerMetadata)
        metric = metadata.get("metric", "desired_replicas")
        if metric not in METRICS:
            names = ", ".join(METRICS)
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"metric {metric!r}: expected one of {names}"
            )
        if metric == "desired_replicas":
            return metric, 1.0
        try:
            target = float(metadata["target"])
        except (KeyError, ValueError):
            target = 0.0
        if not 0 < target < float("inf"):
            text = metadata.get("target")
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"target {text!r}: expected a number above 0"
            )
        return metric, target

    async def _value(self, metric: str, context: Any) -> float:
        value = self._last.value(metric)
        if value is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{metric} is missing or outdated")
        assert value is not None
        return value
