"""Hold requests until a replica is ready, bounded in number and time, and wake a fleet at zero."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from prometheus_client import Gauge

from farthing.exchange import ReplicaLost, Upstream
from farthing.shares import Shares
from farthing_fleet.gateway.errors import Refused
from farthing_fleet.gateway.metrics import GatewayMetrics

T = TypeVar("T")
_AGAIN_S = 0.25  # between looks for a replica: the end of a breaker's pause is not announced
_BATCH, _PAUSE_S = 32, 0.02  # requests released together, so that a replica's accept queue does not overflow


class Hold:
    """Counts waiting requests; the count wakes a fleet that is scaled to zero.

    API keys take turns. If there is no room for another request, the newest one of the key with most gives
    way, so one key's requests never take the others' places.
    """

    def __init__(
        self,
        limit: int,
        gauge: Gauge,
        available: Callable[[], bool],
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        """gauge: shows the number of waiting requests; available: whether some replica takes requests."""
        self._limit, self._gauge, self._available, self._on_arrival = limit, gauge, available, on_arrival
        self._shares = Shares()
        # By key, in the order in which they went to sleep: waiting requests, each with the number of its
        # arrival and of the last look before.
        self._sleeping: dict[str, dict[asyncio.Future[None], tuple[int, int]]] = {}
        self._arrived = self._looks = 0
        self._timer: asyncio.TimerHandle | None = None
        self.waiting = 0
        self.stopping = False

    def notify(self) -> None:
        """Look for a replica now: the replicas or their health changed, or the gateway stops."""
        if self._timer is not None:
            self._timer.cancel()
            self._look()

    async def until(self, ready: Callable[[], T | None], deadline: float, key: str = "") -> T | None:
        """Wait until `ready` returns a value; None at the deadline (loop time) or on shutdown.

        key: the name of the request's API key. Raises Refused if there is no room for the request.
        """
        if self.waiting >= self._limit:
            self._make_room(key)
        loop = asyncio.get_running_loop()
        self.waiting += 1
        self._shares.enter(key)
        self._arrived += 1
        arrived = self._arrived
        self._on_arrival()
        self._gauge.inc()
        if self._timer is None:
            self._timer = loop.call_later(_AGAIN_S, self._look)
        try:
            while not self.stopping and (left := deadline - loop.time()) > 0:
                woken = loop.create_future()
                self._sleeping.setdefault(key, {})[woken] = arrived, self._looks
                try:
                    async with asyncio.timeout(left):
                        await woken
                except TimeoutError:
                    pass
                finally:
                    self._forget(key, woken)
                if (result := ready()) is not None:
                    return result
            return None
        finally:
            self.waiting -= 1
            self._shares.leave(key)
            self._gauge.dec()

    def _make_room(self, key: str) -> None:
        """Refuse the newest request of the key with most. Raises Refused if that is the one to come."""
        # Not `Shares.work`: it still counts those that were refused until their tasks run.
        waiting = {name: len(sleeping) for name, sleeping in self._sleeping.items()}
        greediest = max(waiting, key=waiting.__getitem__, default=key)
        sleeping = {f: order for f, order in self._sleeping.get(greediest, {}).items() if not f.done()}
        mine = waiting.get(key, 0) + 1 >= waiting.get(greediest, 0) or not sleeping
        refused = Refused(
            503,
            f"no replica is ready and {self._limit} requests (the limit) already wait, "
            f"{waiting.get(key if mine else greediest, 0)} of this key; retry later",
            headers={"Retry-After": "1"},
        )
        if mine:
            raise refused
        newest = max(sleeping, key=sleeping.__getitem__)
        self._forget(greediest, newest)
        newest.set_exception(refused)

    def _forget(self, key: str, woken: asyncio.Future[None]) -> None:
        sleeping = self._sleeping.get(key, {})
        sleeping.pop(woken, None)
        if not sleeping:
            self._sleeping.pop(key, None)

    def _look(self) -> None:
        """Wake the waiting requests if a replica is available: in batches, each once per look, in turns of
        their keys."""
        self._timer = None
        if not self.waiting:
            return
        available = self._available()
        if self.stopping or not available:
            self._looks += 1  # all are due, now or once a replica is available
        due = self._due() if self.stopping or available else {}
        for _ in range(self.waiting if self.stopping else _BATCH):
            if not due:
                break
            key = self._shares.next(due)
            woken = due[key].popleft()
            if not due[key]:
                del due[key]
            self._shares.charge(key, 1)
            self._forget(key, woken)
            if not woken.done():  # else its client has left, or its time is up
                woken.set_result(None)
        pause = _PAUSE_S if due else _AGAIN_S
        self._timer = asyncio.get_running_loop().call_later(pause, self._look)

    def _due(self) -> dict[str, deque[asyncio.Future[None]]]:
        """By key, the requests that the last look has still to wake; if there are none, a new look begins."""
        for _ in range(2):
            due = {
                key: deque(woken for woken, (_, look) in sleeping.items() if look < self._looks)
                for key, sleeping in self._sleeping.items()
            }
            if any(due.values()):
                return {key: queue for key, queue in due.items() if queue}
            self._looks += 1
        return {}


class Holds:
    """A Hold for each model, so that requests for one model never take the places or the turns of others."""

    def __init__(self, limit: int, metrics: GatewayMetrics, available: Callable[[str], bool]) -> None:
        """available: whether some replica of a pool takes requests."""
        self._limit, self._metrics, self._available = limit, metrics, available
        self._holds: dict[str, Hold] = {}
        self.arrivals: list[asyncio.Event] = []  # set whenever a request begins to wait
        self.stopping = False

    def __getitem__(self, pool: str) -> Hold:
        """The Hold of a pool."""
        hold = self._holds.get(pool)
        if hold is None:
            gauge = self._metrics.waiting.labels(pool)
            hold = Hold(self._limit, gauge, lambda: self._available(pool), self._arrived)
            self._holds[pool] = hold
        return hold

    @property
    def waiting(self) -> int:
        """Requests that wait, of all models."""
        return sum(hold.waiting for hold in self._holds.values())

    def notify(self) -> None:
        """As `Hold.notify`, for all models."""
        for hold in self._holds.values():
            hold.notify()

    def stop(self) -> None:
        """Let no request wait any longer."""
        self.stopping = True
        for hold in self._holds.values():
            hold.stopping = True
        self.notify()

    def _arrived(self) -> None:
        for event in self.arrivals:
            event.set()


# Reports held requests to the controller, which wakes a fleet that is scaled to zero.

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_TIMEOUT_S = 2.0
_JSON = {"Content-Type": "application/json"}


class Waker:
    """Reports to a controller's `/wake`: immediately when the first request is held, then every second."""

    def __init__(self, url: str, holds: Holds, pool: str | None = None) -> None:
        """pool: whose requests are reported; None: all. Raises ValueError unless `url` is
        http://HOST:PORT/PATH or https://….
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"wake: got {url!r}; expected a URL such as http://127.0.0.1:9400/wake")
        self._url, self._holds, self._pool = url, holds, pool
        self._base, self._target = (
            f"{parts.scheme}://{parts.netloc}",
            parts._replace(scheme="", netloc="").geturl() or "/",
        )
        self._http = Upstream(_TIMEOUT_S, _TIMEOUT_S)
        self._arrival = asyncio.Event()
        holds.arrivals.append(self._arrival)
        self._name = f"{socket.gethostname()}-{os.getpid()}"

    async def run(self) -> None:
        """Report forever."""
        silent = False
        while True:
            if not self._waiting:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            problem = await self._report()
            if problem and not silent:
                log.warning("cannot reach the controller at %s: %s", self._url, problem)
            silent = bool(problem)
            await asyncio.sleep(_EVERY_S)

    @property
    def _waiting(self) -> int:
        return self._holds.waiting if self._pool is None else self._holds[self._pool].waiting

    async def _report(self) -> str:
        """Send one report. Returns the problem, or an empty string."""
        report = json.dumps({"gateway": self._name, "waiting": self._waiting}).encode()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._http.send(self._base, "POST", self._target, _JSON, report)
            answer.close()
            return "" if answer.status < 300 else f"status {answer.status}"
        except (ReplicaLost, TimeoutError) as problem:
            return str(problem) or type(problem).__name__
