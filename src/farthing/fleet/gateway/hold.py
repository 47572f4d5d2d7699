"""Requests that are held until a replica is ready: bounded in number and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from farthing.fleet.gateway.errors import Refused
from farthing.fleet.gateway.metrics import GatewayMetrics

T = TypeVar("T")
_AGAIN_S = 0.25  # a replica that is tried again after a breaker's pause announces nothing


class Hold:
    """Counts the requests that wait; the count is the signal that wakes a fleet of no replicas."""

    def __init__(self, limit: int, metrics: GatewayMetrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._changed = asyncio.Event()
        self.occupied = asyncio.Event()  # set while requests wait
        self.waiting = 0
        self.stopping = False

    def notify(self) -> None:
        """The set of replicas, or the health of one, has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, ready: Callable[[], T | None], deadline: float) -> T | None:
        """What `ready` returns once that is not None; None at the deadline (loop time) or on shutdown.

        Raises Refused where too many requests wait already.
        """
        if self.waiting >= self._limit:
            raise Refused(
                503,
                f"no replica is ready and {self.waiting} requests wait (the limit); retry later",
                headers={"Retry-After": "1"},
            )
        now = asyncio.get_running_loop().time
        self.waiting += 1
        self.occupied.set()
        self._metrics.waiting.inc()
        try:
            while not self.stopping and (left := deadline - now()) > 0:
                changed = self._changed
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _AGAIN_S)):
                        await changed.wait()
                if (found := ready()) is not None:
                    return found
            return None
        finally:
            self.waiting -= 1
            if not self.waiting:
                self.occupied.clear()
            self._metrics.waiting.dec()
