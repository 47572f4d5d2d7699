"""For where an HPA or KEDA acts by itself: nothing is applied, the number of replicas is only read."""

from __future__ import annotations

from farthing.fleet.actuators.base import Actuator
from farthing.fleet.decisions import Decision


class ReadOnly:
    """Reads `/scale` where a target is given; without one the controller goes by the replicas that serve."""

    def __init__(self, scale: Actuator | None = None) -> None:
        self._scale = scale

    async def start(self) -> None:
        """Nothing to start."""

    async def current(self) -> int | None:
        return await self._scale.current() if self._scale is not None else None

    async def apply(self, decision: Decision) -> None:
        """Others act on the last_decision."""

    async def close(self) -> None:
        """Nothing to close."""
