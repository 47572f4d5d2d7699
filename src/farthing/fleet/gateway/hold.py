"""Hold requests until a replica is ready, bounded in number and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from farthing.fleet.gateway.errors import Refused
from farthing.fleet.gateway.metrics import GatewayMetrics

T = TypeVar("T")
_AGAIN_S = 0.25  # poll: the end of a breaker's pause is not announced


class Hold:
    """Counts waiting requests; the count wakes a fleet that is scaled to zero."""

    def __init__(self, limit: int, metrics: GatewayMetrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._changed = asyncio.Event()
        self.occupied = asyncio.Event()  # set while requests wait
        self.waiting = 0
        self.stopping = False

    def notify(self) -> None:
        """Notify waiters that the replicas or their health changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, ready: Callable[[], T | None], deadline: float) -> T | None:
        """Wait until `ready` returns a value; None at the deadline (loop time) or on shutdown.

        Raises Refused if too many requests already wait.
        """
        if self.waiting >= self._limit:
            raise Refused(
                503,
                f"no replica is ready and {self.waiting} requests are waiting (the limit); retry later",
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
