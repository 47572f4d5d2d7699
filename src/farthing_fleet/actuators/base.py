"""The actuator interface, and an actuator that only reads."""

from __future__ import annotations

from typing import Protocol

from farthing_fleet.types import Decision


class ActuatorError(Exception):
    """The actuator could not read or set the number of replicas. The controller holds and retries."""


class Actuator(Protocol):
    """Sets a number of replicas."""

    async def current(self) -> int | None:
        """Replicas requested now; None if unknown.

        Raises ActuatorError if the request fails.
        """
        ...

    async def apply(self, decision: Decision) -> None:
        """Request `decision.target` replicas without waiting until they are ready. Raises ActuatorError."""
        ...


class ReadOnly:
    """Reads `/scale` if a target is given; otherwise the controller counts the serving replicas."""

    def __init__(self, scale: Actuator | None = None) -> None:
        self._scale = scale

    async def current(self) -> int | None:
        return await self._scale.current() if self._scale is not None else None

    async def apply(self, decision: Decision) -> None:
        """No-op: others act on the decision."""
