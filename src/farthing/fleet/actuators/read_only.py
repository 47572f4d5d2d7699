"""For an HPA or KEDA that scales: reads the number of replicas and applies nothing."""

from __future__ import annotations

from farthing.fleet.actuators.base import Actuator
from farthing.fleet.decisions import Decision


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
