"""Hold requests until a replica is ready, bounded in number and time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from farthing.fleet.gateway.errors import Refused
from farthing.fleet.gateway.metrics import GatewayMetrics

T = TypeVar("T")
_AGAIN_S = 0.25  # between looks for a replica: the end of a breaker's pause is not announced
_BATCH, _PAUSE_S = 32, 0.02  # requests released together, so that a replica's accept queue does not overflow


class Hold:
    """Counts waiting requests; the count wakes a fleet that is scaled to zero."""

    def __init__(self, limit: int, metrics: GatewayMetrics, available: Callable[[], bool]) -> None:
        """available: whether some replica takes requests."""
        self._limit, self._metrics, self._available = limit, metrics, available
        self._sleeping: dict[asyncio.Future[None], None] = {}  # a waiting request each, by arrival
        self._due: deque[asyncio.Future[None]] = deque()  # of them, those still to be woken by this look
        self._timer: asyncio.TimerHandle | None = None
        self.occupied = asyncio.Event()  # set while requests wait
        self.waiting = 0
        self.stopping = False

    def notify(self) -> None:
        """Look for a replica now: the replicas or their health changed, or the gateway stops."""
        if self._timer is not None:
            self._timer.cancel()
            self._look()

    async def until(self, ready: Callable[[], T | None], deadline: float) -> T | None:
        """Wait until `ready` returns a value; None at the deadline (loop time) or on shutdown.

        Raises Refused if too many requests already wait.
        """
        if self.waiting >= self._limit:
            raise Refused(
                503,
                f"no replica is ready and {self._limit} (the limit) already wait; retry later",
                headers={"Retry-After": "1"},
            )
        loop = asyncio.get_running_loop()
        self.waiting += 1
        self.occupied.set()
        self._metrics.waiting.inc()
        if self._timer is None:
            self._timer = loop.call_later(_AGAIN_S, self._look)
        try:
            while not self.stopping and (left := deadline - loop.time()) > 0:
                woken = loop.create_future()
                self._sleeping[woken] = None
                try:
                    async with asyncio.timeout(left):
                        await woken
                except TimeoutError:
                    pass
                finally:
                    self._sleeping.pop(woken, None)
                if (found := ready()) is not None:
                    return found
            return None
        finally:
            self.waiting -= 1
            if not self.waiting:
                self.occupied.clear()
            self._metrics.waiting.dec()

    def _look(self) -> None:
        """Wake the waiting requests if a replica is available: in batches, each once per look."""
        self._timer = None
        if not self.waiting:
            self._due.clear()
            return
        if not (self.stopping or self._available()):
            self._due.clear()
        elif self.stopping or not self._due:
            self._due = deque(self._sleeping)
        count = len(self._due) if self.stopping else min(_BATCH, len(self._due))
        for future in [self._due.popleft() for _ in range(count)]:
            self._sleeping.pop(future, None)
            if not future.done():  # else its client has left, or its time is up
                future.set_result(None)
        pause = _PAUSE_S if self._due else _AGAIN_S
        self._timer = asyncio.get_running_loop().call_later(pause, self._look)
