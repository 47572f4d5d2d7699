"""Limits on connections below HTTP: their number, and the size and arrival time of a request's head.

uvicorn limits neither. This protocol adds a timer and a counter to uvicorn's. A connection is *waiting* until
a head is complete and after its response; otherwise it is busy, and `Job` and `Bodies` limit it. If there are
too many connections, a new one replaces the one that has waited longest, so idle sockets cannot keep clients
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from farthing.server.config import TOO_FINE, ambiguity, too_fine
from farthing.server.errors import ClientTooSlow

log = logging.getLogger("farthing.server")

_PIPELINED = 32  # requests of one connection queued after the one being answered
_TRAILERS = 64  # fields after a chunked body, which are ignored
_SHARE = 0.75  # maximum share of all connections for one address


class Connections:
    """The open connections of a server. Only the event loop touches it."""

    def __init__(self, limit: int, max_head_bytes: int, head_seconds: float, idle_seconds: float) -> None:
        self.limit = limit
        self.limit_by_address = max(1, int(limit * _SHARE))
        self.max_head_bytes = max_head_bytes
        self.head_seconds = head_seconds
        self.idle_seconds = idle_seconds  # between the requests of a connection
        self.refused = 0
        self.evicted = 0
        self._open: Counter[str] = Counter()  # by address
        self._waiting: OrderedDict[Guarded, str] = OrderedDict()  # longest wait first

    def __len__(self) -> int:
        return self._open.total()

    def opened(self, connection: Guarded, address: str) -> bool:
        """Count a new, waiting connection; False if there is no room for it."""
        if self._open[address] >= self.limit_by_address:
            room = self._evict(address)
        else:
            room = self._open.total() < self.limit or self._evict(None)
        self._open[address] += 1
        if not room:
            self.refused += 1
            return False
        self._waiting[connection] = address
        return True

    def closed(self, connection: Guarded, address: str) -> None:
        """Remove a connection."""
        self._waiting.pop(connection, None)
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]

    def waits(self, connection: Guarded, address: str) -> None:
        """Mark it as waiting: its response has been sent, and no other request is complete."""
        self._waiting.setdefault(connection, address)

    def works(self, connection: Guarded) -> None:
        """Mark it as busy: a request is being answered."""
        self._waiting.pop(connection, None)

    def _evict(self, address: str | None) -> bool:
        for connection, owner in self._waiting.items():
            if address is None or owner == address:
                del self._waiting[connection]
                self.evicted += 1
                connection.transport.abort()
                return True
        return False


class Guarded(HttpToolsProtocol):
    """The protocol of a connection, parsed by httptools."""

    guard: Connections
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _address = ""
    _counted = False
    _answered = False  # a request, so that the connection may idle
    _in_head = False  # a part of a head has arrived
    _running: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait for it
    _in_body = False  # arriving bytes belong to a request whose head is complete
    _overrun = False
    _problem = ""
    _chunks = _body_bytes = _trailers = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection or reject it."""
        super().connection_made(transport)
        if (connected := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):  # detects peers that vanished
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._counted = True
        if self.guard.opened(self, self._address):
            self._arm()
        else:
            self._refuse("503 Service Unavailable", "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection, and end all of its requests."""
        self._abandon()
        self._disarm()
        if self._counted:
            self._counted = False
            self.guard.closed(self, self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and time it."""
        if not (self._busy() or self._in_body):
            if not self._head_bytes:
                self._disarm()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._busy() or self._in_body:
            self._head_bytes = 0
        elif self._head_bytes > self.guard.max_head_bytes and not self.transport.is_closing():
            limit = self.guard.max_head_bytes
            self._refuse("431 Request Header Fields Too Large", f"expected at most {limit} bytes")
            return
        self._settle()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._answered = True
        super().on_response_complete()
        self._settle()

    def _settle(self) -> None:
        if self._busy():
            self._disarm()
            self.guard.works(self)
        elif self._counted:
            if self._in_head and not self._head_bytes:
                self._head_bytes = 1  # at least: it began during the request before it
            self.guard.waits(self, self._address)
            self._arm()

    def _arm(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            idle = self._answered and not (self._head_bytes or self._in_body)
            seconds = self.guard.idle_seconds if idle else self.guard.head_seconds
            self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._head_bytes:
            self._refuse("408 Request Timeout", f"expected a head within {self.guard.head_seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: str, message: str) -> None:
        text = f"{message}\n"
        head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{text}".encode())
        self.transport.close()

    def _busy(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _abandon(self) -> None:
        """Tell every request that its client is gone. uvicorn tells the newest only, and the others would
        write to a closed transport."""
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in filter(None, (*waiting, self._running)):
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except ClientTooSlow:
                cycle.disconnected = True  # uvicorn would log an error
                self.transport.abort()

        self._running = cycle
        super()._start_asgi_task(cycle, answer)  # type: ignore[arg-type]

    def on_message_begin(self) -> None:
        """Handle the first byte of a head."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Handle a complete head. After too many pipelined requests parsing ends; accepted ones are answered.

        A packet may contain thousands of requests, and uvicorn parses all of them before it pauses reading.
        """
        if len(self.pipeline) >= _PIPELINED:
            newest: Any = self.cycle
            newest.keep_alive = False  # its response closes the connection
            self._overrun = True
            raise OverflowError(f"more than {_PIPELINED} pipelined requests")
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._reject("expected HTTP/1.1")
        if (problem := ambiguity(self.url, self.headers, (1, int(version[-1])))) is not None:
            self._reject(problem)
        self._in_head, self._in_body = False, True
        self._chunks = self._body_bytes = self._trailers = 0
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header. Trailers are ignored: the application has already read the headers."""
        if not self._in_body:
            super().on_header(name, value)
            return
        self._trailers += 1
        if self._trailers > _TRAILERS:
            self._reject(f"expected at most {_TRAILERS} trailers")

    def on_chunk_header(self) -> None:
        """Count a chunk of a body."""
        self._chunks += 1
        if too_fine(self._chunks, self._body_bytes):
            self._reject(TOO_FINE)

    def on_body(self, body: bytes) -> None:
        """Handle a part of a body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Handle a complete body."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject input that cannot be parsed. Within an answer, where the client would take the error for a
        part of it, the connection only closes."""
        if self._overrun:
            return
        running = self._running
        if running is not None and running.response_started and not running.response_complete:
            self.transport.close()
        else:
            super().send_400_response(self._problem or msg)
        self._abandon()

    def _reject(self, problem: str) -> NoReturn:
        """End parsing from within a callback of the parser."""
        self._problem = problem
        raise ValueError(problem)


def protocol(guard: Connections) -> Callable[..., asyncio.Protocol]:
    """The class that uvicorn instantiates per connection."""
    return type("Protocol", (Guarded,), {"guard": guard})
