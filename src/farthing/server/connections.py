"""Limits on connections below HTTP: their number, and the size and arrival time of a request's head.

uvicorn limits neither. These protocols add a timer and a counter to its own. A connection is *waiting* until
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
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    _Base = H11Protocol
else:
    _Base = object

log = logging.getLogger("farthing.server")

_SHARE = 0.75  # maximum share of all connections for one address


class Connections:
    """The open connections of a server. Only the event loop touches it."""

    def __init__(self, limit: int, max_head_bytes: int, head_seconds: float) -> None:
        self.limit = limit
        self.limit_by_address = max(1, int(limit * _SHARE))
        self.max_head_bytes = max_head_bytes
        self.head_seconds = head_seconds
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
            room = len(self) < self.limit or self._evict(None)
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


class Guarded(_Base):
    """A mixin of uvicorn's protocols."""

    guard: Connections
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _address = ""
    _counted = False

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
        """Remove the connection."""
        self._disarm()
        if self._counted:
            self._counted = False
            self.guard.closed(self, self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and time it."""
        if not (self._busy() or self._reading_body()):
            if not self._head_bytes:
                self._disarm()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._busy() or self._reading_body():
            self._head_bytes = 0
        elif self._head_bytes > self.guard.max_head_bytes and not self.transport.is_closing():
            limit = self.guard.max_head_bytes
            self._refuse("431 Request Header Fields Too Large", f"expected at most {limit} bytes")
            return
        self._settle()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._settle()

    def _settle(self) -> None:
        if self._busy():
            self._disarm()
            self.guard.works(self)
        elif self._counted:
            self.guard.waits(self, self._address)
            self._arm()

    def _arm(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.guard.head_seconds, self._late)

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

    def _reading_body(self) -> bool:
        """Whether arriving bytes belong to a request whose head is complete."""
        raise NotImplementedError


class GuardedH11(Guarded, H11Protocol):
    """On h11, which is always installed."""

    def _reading_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY
