"""Health checks: polls each replica and detects replicas that stop answering."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.replicas import Replica
from farthing.fleet.gateway.silence import Silence

log = logging.getLogger(__name__)

_FIRST_CHECK_S = 0.1  # between checks of a replica that has never been healthy


class Health:
    """Monitors replicas; calls on_change when one becomes healthy or unhealthy."""

    def __init__(
        self, config: GatewayConfig, silence: Callable[[], Silence], on_change: Callable[[], None]
    ) -> None:
        self._config, self._silence, self._on_change = config, silence, on_change
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self._config.health_timeout_s),
        )

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def watch(self, replica: Replica) -> None:
        """Check a replica until it drains."""
        task = asyncio.create_task(self._watch(replica))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def check(self, replica: Replica) -> int | None:
        """The status code of one health check; None on timeout."""
        assert self._session is not None
        try:
            async with self._session.get(replica.url + self._config.health_path) as answer:
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def alive(self, replica: Replica) -> bool:
        """Whether the replica's process answers at all."""
        return await self.check(replica) is not None

    async def _watch(self, replica: Replica) -> None:
        seen_healthy = False
        while not replica.draining:
            before = replica.healthy
            status = await self.check(replica)
            replica.checked(status == 200, self._config.unhealthy_after)
            seen_healthy |= replica.healthy
            if replica.healthy != before:
                log.info("replica %s is %s", replica.name, "healthy" if replica.healthy else "unhealthy")
                self._on_change()
            if status is None and not replica.healthy and before:
                self._give_up(replica, "no answer to health checks")
            elif replica.healthy and self._silence().hung(replica, asyncio.get_running_loop().time()):
                replica.breaker.trip()
                self._give_up(replica, f"silent for {self._silence().limit_s:.1f} s")
            await asyncio.sleep(self._config.health_interval_s if seen_healthy else _FIRST_CHECK_S)

    def _give_up(self, replica: Replica, reason: str) -> None:
        """Move the requests that wait for a first byte to other replicas."""
        unanswered = [active for active in replica.active if not active.heard]
        log.warning("replica %s: %s; moving %d unanswered requests", replica.name, reason, len(unanswered))
        for active in unanswered:
            active.interrupt("hung")
