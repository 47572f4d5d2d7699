"""One connection to a replica, and the pool of idle ones.

Callbacks, not streams: a token costs one parse and one write.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import httptools

from farthing.fleet.gateway.messages import Headers, ResponseHead


class ReplicaLost(Exception):
    """The connection to a replica could not be made or ended before the answer was whole."""


class Sink(Protocol):
    """Who receives an answer. `lost` and `end` are final; exactly one of them is called."""

    def head(self, head: ResponseHead) -> None: ...

    def body(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def lost(self, reason: str) -> None: ...


class Upstream(asyncio.Protocol):
    """A connection that carries one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.last_activity = time.monotonic()
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._parts: list[bytes] = []
        self._ended = False
        self._until_close = False
        self._bodiless = False
        self.reusable = True
        self.fresh = True  # no exchange went over it yet

    # ---- asyncio.Protocol ------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.last_activity = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            self.reusable = False
            self._lose(f"an answer that is not HTTP ({problem})")
            self.abort()
            return
        sink = self._sink
        if sink is None:
            return
        if self._parts:
            parts, self._parts = self._parts, []
            sink.body(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._ended:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self.transport = None
        if self._sink is not None and self._until_close and exc is None:
            self._finish()
        else:
            self._lose(str(exc) if exc else "the connection was closed")

    # ---- exchange --------------------------------------------------------------------------------
    @property
    def alive(self) -> bool:
        return self.transport is not None and self.reusable and not self.transport.is_closing()

    def send(self, data: bytes, sink: Sink, *, bodiless: bool = False) -> None:
        """Start an exchange; `bodiless` for HEAD, whose answer announces a body that never comes."""
        assert self._sink is None, "an exchange is under way on this connection"
        if self.transport is None:
            raise ReplicaLost("the connection was closed")
        self._sink, self._ended, self._until_close, self._bodiless = sink, False, False, bodiless
        self.last_activity = time.monotonic()
        self.transport.write(data)

    def abort(self) -> None:
        """End the connection at once; the replica sees a client that went away. The sink hears no more."""
        self._sink = None
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _finish(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.end()

    def _lose(self, reason: str) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.lost(reason)

    # ---- httptools callbacks ---------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._sink is None:
            return
        named = dict(self._headers)
        length = named.get(b"content-length")
        empty = status in (204, 304)
        self._until_close = length is None and b"transfer-encoding" not in named and not empty
        if not self._parser.should_keep_alive() or self._until_close or self._bodiless:
            self.reusable = False
        self._sink.head(ResponseHead(status, self._headers, 0 if empty else int(length) if length else None))
        if self._bodiless:
            self._ended = True

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._ended = True


class Pool:
    """Idle connections to one replica, the youngest first."""

    def __init__(self, host: str, port: int, connect_timeout_s: float) -> None:
        self.host, self.port, self._timeout = host, port, connect_timeout_s
        self._idle: list[Upstream] = []

    async def acquire(self) -> Upstream:
        """An open connection. Raises ReplicaLost when the replica cannot be reached."""
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection
        return await self.connect()

    async def connect(self) -> Upstream:
        """A new connection. Raises ReplicaLost when the replica cannot be reached."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(Upstream, self.host, self.port)
        except (OSError, TimeoutError) as problem:
            raise ReplicaLost(
                f"cannot connect to {self.host}:{self.port} ({problem or 'timed out'})"
            ) from problem
        return connection

    def release(self, connection: Upstream) -> None:
        """Give a connection back after its exchange."""
        if connection.alive:
            connection.fresh = False
            self._idle.append(connection)
        elif connection.transport is not None:
            connection.transport.close()

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
