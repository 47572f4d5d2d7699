"""Reports held requests to the controller, which wakes a fleet that is scaled to zero."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from urllib.parse import urlsplit

import aiohttp

from farthing.fleet.gateway.hold import Hold

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_TIMEOUT_S = 2.0


class Waker:
    """Reports to the controller's `/wake`: immediately when the first request is held, then every second."""

    def __init__(self, url: str, hold: Hold) -> None:
        """Raises ValueError unless `url` is http://HOST:PORT/PATH or https://…."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"wake: got {url!r}; expected a URL such as http://127.0.0.1:9400/wake")
        self._url, self._hold = url, hold
        self._name = f"{socket.gethostname()}-{os.getpid()}"

    async def run(self) -> None:
        """Report forever."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        silent = False
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await self._hold.occupied.wait()
                problem = await self._report(session)
                if problem and not silent:
                    log.warning("cannot reach the controller at %s: %s", self._url, problem)
                silent = bool(problem)
                await asyncio.sleep(_EVERY_S)

    async def _report(self, session: aiohttp.ClientSession) -> str:
        """Send one report. Returns the problem, or an empty string."""
        report = {"gateway": self._name, "waiting": self._hold.waiting}
        try:
            async with session.post(self._url, json=report) as answer:
                return "" if answer.status < 300 else f"status {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            return str(problem) or type(problem).__name__
