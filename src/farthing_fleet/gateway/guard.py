"""Limits on client connections and bodies, applied before parsing and authentication.

aiohttp limits each header line, but not the size of a whole head, the time until it is complete, or the
number of connections. `Guard` sits between the transport and aiohttp's protocol and adds these limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from farthing.server.config import TOO_FINE, too_fine
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.errors import Refused, error_response, raw_error, summary

# The head of a chunk of less than 256 bytes; JSON has no such line.
_CHUNK = re.compile(rb"\r\n0*[0-9a-fA-F]{1,2}[;\r \t]")
_HEAD_END = b"\r\n\r\n"
_LINGER_S = 3.0  # for a client that still sends after it was answered
_TCP_USER_TIMEOUT = 18  # Linux: milliseconds sent data may stay unacknowledged (tcp(7))

Phase = Literal["head", "request", "closing"]


class Door:
    """The open client connections, bounded in total and per client address."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.guards: set[Guard] = set()
        self._clients: Counter[str] = Counter()

    def admit(self, guard: Guard) -> str | None:
        """Add a connection. Returns why it is refused, or None if it is admitted."""
        if len(self.guards) >= self.config.max_connections:
            return f"gateway has {self.config.max_connections} open connections (the limit); retry later"
        if self._clients[guard.peer] >= self.config.max_client_connections:
            return f"{self.config.max_client_connections} connections from this address (the limit)"
        self.guards.add(guard)
        self._clients[guard.peer] += 1
        return None

    def leave(self, guard: Guard) -> None:
        """Remove an admitted connection."""
        if guard in self.guards:
            self.guards.remove(guard)
            self._clients[guard.peer] -= 1
            if not self._clients[guard.peer]:
                del self._clients[guard.peer]


class Guard(asyncio.Protocol):
    """One client connection: limits the size and time of each request head, and idle time.

    Phases: `head` (no complete request head yet), `request` (a handler runs), `closing` (answered; the
    connection is closing).
    """

    def __init__(self, door: Door, handler: GatewayProtocol) -> None:
        self._door, self._handler = door, handler
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._admitted = False
        self._bytes = 0  # received since the last request ended
        self._chunks = 0  # small ones since then
        self._body: aiohttp.StreamReader | None = None  # of the current request
        self._spoiled = False  # the last body was malformed: nothing after it can be parsed
        self._length: int | None = 0  # of the current request's body; None if it is chunked
        self._after: int | None = None  # bytes received after the head's end; None without a complete head
        self._tail = b""  # the last four bytes received
        self.phase: Phase = "head"
        self.fresh = True  # no request yet on this connection
        self.peer = "unknown"

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if peer else "unknown"
        problem = self._door.admit(self)
        if problem is not None:
            self.refuse(503, problem)
            return
        self._admitted = True
        self._bound_unacknowledged()
        self._handler.connection_made(transport)
        self._arm(self._door.config.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._disarm()
        self._door.leave(self)
        if self._admitted:
            self._handler.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._admitted or self._spoiled or (self.phase == "closing" and self._overrun(data)):
            return
        if self.phase == "head":
            # Checked before counting this data: it may contain a whole head and part of a body, of which more
            # can arrive before the handler starts.
            if self._bytes > self._door.config.max_head and self._after is None:
                self.refuse(431, f"request head exceeds {self._door.config.max_head} bytes")
                return
            if not self._bytes:
                self._arm(self._door.config.head_timeout_s)
            self._bytes += len(data)
        self._measure(data)
        if self._too_fine(data):
            self._reject_body(TOO_FINE)
            return
        self._handler.data_received(data)
        self._check_body()

    def eof_received(self) -> bool | None:
        if self._admitted:
            self._handler.eof_received()
        return None

    def pause_writing(self) -> None:
        if self._admitted:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        if self._admitted:
            self._handler.resume_writing()

    # ---- request lifecycle ----

    def started(self, body: aiohttp.StreamReader, length: int | None) -> None:
        """Called when a complete head has been parsed and its handler starts. length: None if chunked."""
        self.phase, self.fresh, self._bytes = "request", False, 0
        self._body, self._chunks, self._length = body, 0, length
        self._disarm()
        self._check_body()

    def ended(self, *, close: bool) -> None:
        """Called when the handler has finished. close: close the connection."""
        more = self._more()
        if self._body is not None and self._body.exception() is not None:
            self._spoiled = close = True
            self._body.feed_eof()  # aiohttp would read on, and log the error of which the client was told
        self._bytes, self._body, self._after = 0, None, None
        if self._transport is None:
            return
        self.phase = "closing" if close else "head"
        if more and not close:
            self._bytes = 1  # at least: a head has begun
            self._arm(self._door.config.head_timeout_s)
        else:
            self._tail = b""
            self._arm(_LINGER_S if close else self._door.config.keepalive_s)

    @property
    def write_buffer(self) -> int:
        """Bytes not yet read by the client."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        """Close a connection without a request."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset the connection, so that a client cannot mistake a partial answer for a complete one."""
        if self._transport is not None:
            self._transport.abort()

    # ---- limits ----

    def _measure(self, data: bytes) -> None:
        """Count the bytes after the head."""
        if self._after is None:
            seen = self._tail + data if self._tail else data.lstrip(b"\r\n")  # empty lines before a head
            end = seen.find(_HEAD_END)
            self._after = len(seen) - end - len(_HEAD_END) if end >= 0 else None
            self._tail = seen[-4:]
        else:
            self._after += len(data)
            self._tail = (self._tail + data[-4:])[-4:]

    def _more(self) -> bool:
        """Whether a part of another request was received during the one that ended.

        aiohttp does not tell. A request that was itself pipelined has no head in `_measure`; it and a
        chunked one end with an empty line if nothing follows.
        """
        if self._after is not None and self._length is not None:
            return self._after > self._length
        return self._tail not in (b"", _HEAD_END)

    def _too_fine(self, data: bytes) -> bool:
        """Count the chunks in data before they are parsed: aiohttp parses all that arrived at once."""
        if self.phase == "request":
            self._bytes += len(data)
        self._chunks += len(_CHUNK.findall(data))
        return too_fine(self._chunks, self._bytes)

    def _check_body(self) -> None:
        """Reject a body in which the parser found an error after the handler had started."""
        if self.phase != "request" or self._body is None or self._body.exception() is not None:
            return
        problem = self._handler.problem(self._body)
        if problem is not None:
            self._reject_body(problem)

    def _reject_body(self, problem: str) -> None:
        """Let the handler answer 400; without one, answer here."""
        if self.phase == "request" and self._body is not None:
            self._body.set_exception(web.RequestPayloadError(problem))
        else:
            self.refuse(400, f"request body is malformed: {problem}")

    def _overrun(self, data: bytes) -> bool:
        """Whether an answered client has sent more than a maximum-size body."""
        self._bytes += len(data)
        if self._bytes > self._door.config.max_body:
            self.abort()
            return True
        return False

    def refuse(self, status: int, message: str) -> None:
        """Answer outside a request and close."""
        if self._transport is not None:
            self.phase = "closing"
            self._transport.write(raw_error(status, message))
            self._transport.close()
            self._arm(_LINGER_S)

    def _late(self) -> None:
        self._timer = None
        if self.phase == "head" and self._bytes:
            self.refuse(408, f"no complete request head within {self._door.config.head_timeout_s:g} s")
        elif self.phase == "head":
            self.close()
        else:
            self.abort()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _bound_unacknowledged(self) -> None:
        """Let the kernel close a connection whose client vanished."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                milliseconds = round(self._door.config.write_timeout_s * 1000)
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, milliseconds)


def guard_of(request: web.BaseRequest) -> Guard | None:
    """The guard of a request's connection; None once the connection is lost."""
    transport = request.transport
    guard = transport.get_protocol() if transport is not None else None
    return guard if isinstance(guard, Guard) else None


class Bodies:
    """Memory used by request bodies."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.total = 0  # bytes

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
                self.total += len(data)
                self._check(taken, 0)
                parts.append(data)
            yield parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            self.total -= taken

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
        if self.total + more > self._config.max_body_total:
            raise Refused(
                503,
                f"gateway holds {self.total} bytes of request bodies "
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


# aiohttp's server protocol, guarded, with errors in the API's format.

log = logging.getLogger(__name__)

_MAX_LINE, _MAX_FIELDS = 16 << 10, 100  # bytes per request line or header field, and number of fields
_LINGER_ON_ERROR_S = 2.0  # for a client to read an error while still sending its body


class GatewayProtocol(web.RequestHandler):
    """One client connection."""

    __slots__ = ()

    def problem(self, body: aiohttp.StreamReader) -> str | None:
        """Why the parser gave up within this body of the current request; None if it did not.

        aiohttp queues the error as if it were the next request, and the handler waits for the body forever.
        """
        if not self._messages or body.is_eof():
            return None
        return summary(getattr(self._messages[0][0], "message", ""))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP and internal errors."""
        if isinstance(exc, HttpProcessingError):
            guard = guard_of(request)
            if guard is not None:
                status = 431 if isinstance(exc, LineTooLong) else 400
                guard.refuse(status, f"request is malformed: {summary(message or '')}")
            raise ConnectionError("malformed request")
        if isinstance(exc, ConnectionError):
            raise exc  # by the lines above: the client has its answer, and the connection closes
        log.error("request failed: %s %s", request.method, request.path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has already started")
        return error_response(Refused(status, "internal error of the gateway", close=True), request.path)


def make_factory(
    door: Door, handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
) -> Callable[[], Guard]:
    """A factory of client connections whose requests `handle` answers."""
    server = web.Server(handle, request_factory=_begin, handler_cancellation=True)

    def make() -> Guard:
        protocol = GatewayProtocol(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            lingering_time=_LINGER_ON_ERROR_S,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_FIELDS,
        )
        return Guard(door, protocol)

    return make


def _begin(
    message: Any, payload: Any, protocol: web.RequestHandler, writer: Any, task: asyncio.Task[None]
) -> web.BaseRequest:
    """Create aiohttp's request once its head is complete."""
    request = web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())
    guard = guard_of(request)
    if guard is not None:
        length = None if message.chunked else int(message.headers.get("Content-Length", 0))
        guard.started(payload, length)
    return request
