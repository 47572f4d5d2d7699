"""The actuator interface, the last decision that metric servers report, and an actuator that only reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from farthing_fleet.types import Decision


class ActuatorError(Exception):
    """The actuator could not read or set the number of replicas. The controller holds and retries."""


class Actuator(Protocol):
    """Sets a number of replicas."""

    async def start(self) -> None: ...

    async def current(self) -> int | None:
        """Replicas requested now; None if unknown.

        Raises ActuatorError if the request fails.
        """
        ...

    async def apply(self, decision: Decision) -> None:
        """Request `decision.target` replicas without waiting until they are ready. Raises ActuatorError."""
        ...

    async def close(self) -> None: ...


class LastDecision:
    """The last decision, for servers that an HPA or KEDA polls. Outdated decisions are not reported.

    The server then answers with an error, on which an HPA and KEDA hold the number of replicas.
    """

    def __init__(self, max_age_s: float = 120.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.max_age_s, self._monotonic = max_age_s, monotonic
        self._decision: Decision | None = None
        self._posted_at = 0.0

    def post(self, decision: Decision) -> None:
        self._decision, self._posted_at = decision, self._monotonic()

    def latest(self) -> Decision | None:
        """The last decision; None before the first one or if it is older than `max_age_s`."""
        if self._decision is None or self._monotonic() - self._posted_at > self.max_age_s:
            return None
        return self._decision

    def value(self, metric: str) -> float | None:
        """A metric of the last decision: desired_replicas, queue_backlog or average_response_time
        (seconds).
        """
        decision = self.latest()
        if decision is None:
            return None
        if metric == "desired_replicas":
            return float(decision.target)
        snapshot = decision.inputs.get("snapshot", {})
        stale = decision.decided_by == "stale" or snapshot.get("stale", True)
        value = None if stale else snapshot.get(METRICS[metric])
        return float(value) if value is not None else None


# Metric name for HPA and KEDA -> field of the snapshot.
METRICS = {"desired_replicas": "", "queue_backlog": "backlog", "average_response_time": "ttft_s"}


class ReadOnly:
    """Reads `/scale` if a target is given; otherwise the controller counts the serving replicas."""

    def __init__(self, scale: Actuator | None = None) -> None:
        self._scale = scale

    async def start(self) -> None:
        """No-op."""

    async def current(self) -> int | None:
        return await self._scale.current() if self._scale is not None else None

    async def apply(self, decision: Decision) -> None:
        """No-op: others act on the last decision."""

    async def close(self) -> None:
        """No-op."""
