"""Request bodies, read completely (for retries) and limited individually and in total."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.errors import Refused, summary


class Bodies:
    """Memory used by request bodies."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.held = 0  # bytes

    @asynccontextmanager
    async def read(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        """Read the body of a request; its size counts until the block exits.

        Raises Refused: 413 if it is too large, 503 if all bodies together are, 408 if it stalls.
        """
        announced = request.content_length or 0
        self._check(announced, announced)
        taken = 0
        try:
            parts: list[bytes] = []
            await _continue(request)
            while data := await self._read(request):
                taken += len(data)
                self.held += len(data)
                self._check(taken, 0)
                parts.append(data)
            yield parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            self.held -= taken

    async def _read(self, request: web.BaseRequest) -> bytes:
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                return await request.content.readany()
        except TimeoutError as problem:
            seconds = self._config.body_timeout_s
            raise Refused(408, f"request body stalled for {seconds:g} s", close=True) from problem
        except web.RequestPayloadError as problem:
            raise Refused(400, f"request body is malformed: {summary(problem)}", close=True) from problem

    def _check(self, size: int, more: int) -> None:
        if size > self._config.max_body:
            raise Refused(413, f"request body exceeds {self._config.max_body} bytes", close=True)
        if self.held + more > self._config.max_body_total:
            raise Refused(
                503,
                f"gateway holds {self.held} bytes of request bodies "
                f"(limit {self._config.max_body_total}); retry later",
                headers={"Retry-After": "1"},
                close=True,
            )


async def _continue(request: web.BaseRequest) -> None:
    """Answer `Expect: 100-continue`."""
    expected = request.headers.get("Expect", "")
    if expected.lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    elif expected:
        raise Refused(417, f"Expect: {expected[:100]!r} is not supported; expected 100-continue", close=True)
