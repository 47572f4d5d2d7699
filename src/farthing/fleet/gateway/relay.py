"""One client connection: read a request, choose a replica, pass the answer through byte by byte.

A request may be sent to another replica only while the client has seen nothing of an answer. After that
a replica's death becomes an error event in a stream, or the end of the connection where the framing
leaves no room for one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import httptools

from farthing.fleet.gateway import messages
from farthing.fleet.gateway.messages import Headers, Request, ResponseHead
from farthing.fleet.gateway.replicas import Replica
from farthing.fleet.gateway.upstream import ReplicaLost, Upstream

if TYPE_CHECKING:
    from farthing.fleet.gateway.server import Gateway

_AGAIN_S = 0.25
_BUSY = 503  # a replica that drains or is full says so before its first byte


class Exchange:
    """One try of a request on one replica; a Sink that writes to the client."""

    def __init__(
        self,
        client: ClientConnection,
        request: Request,
        replica: Replica,
        upstream: Upstream,
        last: Callable[[], bool],
    ):
        self.client, self.request, self.replica, self.upstream = client, request, replica, upstream
        self.last_try = last
        self.started = False  # whether the client has seen a byte
        self.status = 0
        self.busy = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._chunked = False
        self._event_stream = False

    def head(self, head: ResponseHead) -> None:
        self.status = head.status
        if head.status == _BUSY and not self.last_try():
            self.busy = True  # its body is read and dropped, so that the connection can be used again
            return
        self._event_stream = head.is_event_stream
        unframed = head.length is None and self.request.method != b"HEAD"
        self._chunked = unframed and self.request.version == "1.1"
        if unframed and not self._chunked:
            self.request.keep_alive = False  # HTTP/1.0 knows no chunks: the body ends with the connection
        self.started = True
        close = not self.request.keep_alive or self.client.gateway.stopping
        self.request.keep_alive = not close
        self.client.first_byte()
        self.client.write(head.render(self.replica.name, chunked=self._chunked, close=close))

    def body(self, data: bytes) -> None:
        if not self.busy:
            self.client.write(messages.chunk(data) if self._chunked else data)

    def end(self) -> None:
        if self._chunked and not self.busy:
            self.client.write(messages.LAST_CHUNK)
        self._resolve(None)

    def lost(self, reason: str) -> None:
        self._resolve(ReplicaLost(reason))

    def _resolve(self, problem: Exception | None) -> None:
        if self.done.done():
            return
        if problem is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(problem)

    def break_off(self, reason: str) -> None:
        """The replica was lost after the first byte: say so if the framing allows, and end the connection."""
        if self._chunked and self._event_stream:
            self.client.write(
                messages.chunk(messages.stream_error(f"replica lost: {reason}")) + messages.LAST_CHUNK
            )
            self.client.close()
        else:
            self.client.abort()


class ClientConnection(asyncio.Protocol):
    """A client's connection; requests on it are served one after the other."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._size = 0
        self._reading = False  # a request has begun and is not whole yet
        self._seen = False  # a request has come at all
        self._pending: list[Request] = []
        self._task: asyncio.Task[None] | None = None
        self._arrived = 0.0

    # ---- asyncio.Protocol ------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.gateway.clients.add(self)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]).encode() if peer else b"unknown"

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "this gateway does not upgrade connections")
        except httptools.HttpParserError as problem:
            self._refuse(400, f"the request is not HTTP/1.1: {problem}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.gateway.clients.discard(self)
        if self.exchange is not None:
            self.exchange.upstream.abort()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream.pause()

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream.resume()

    # ---- towards the client ----------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """A request is being read or served."""
        return self._task is not None or self._reading or bool(self._pending)

    @property
    def expecting(self) -> bool:
        """Connected, and its first request has not come yet."""
        return not self._seen and not self.busy

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        """Close after what was written has gone out."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once, so that a client cannot take a torn answer for a whole one."""
        if self.transport is not None:
            self.transport.abort()

    def give_up(self, reason: str) -> None:
        """End a request under way with an error."""
        exchange = self.exchange
        if exchange is not None and exchange.started:
            exchange.break_off(reason)
        else:
            self._refuse(_BUSY, reason)

    def first_byte(self) -> None:
        self.gateway.metrics.first_byte.observe(self.gateway.now() - self._arrived)

    def _refuse(self, status: int, message: str) -> None:
        self.write(messages.error(status, message, close=True))
        self.close()

    # ---- httptools callbacks ---------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._target, self._headers, self._body, self._size = b"", [], [], 0
        self._reading = self._seen = True

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self.gateway.config.max_body:
            self._body.append(data)
        elif self.transport is not None and not self.transport.is_closing():
            self._refuse(413, f"the body is larger than {self.gateway.config.max_body} bytes")

    def on_message_complete(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        request = Request(
            self._parser.get_method(),
            self._target,
            self._parser.get_http_version(),
            self._headers,
            b"".join(self._body),
            self._parser.should_keep_alive(),
        )
        self._reading = False
        self._pending.append(request)
        if len(self._pending) > 16:  # pipelined further than any client does
            self._refuse(429, "more than 16 requests are pipelined on one connection")
        elif self._task is None:
            self._task = asyncio.ensure_future(self._serve_pending())

    # ---- one request -----------------------------------------------------------------------------
    async def _serve_pending(self) -> None:
        try:
            while self._pending and self.transport is not None:
                request = self._pending.pop(0)
                await self._serve(request)
                if not request.keep_alive or self.gateway.stopping:
                    self.close()
                    return
        except asyncio.CancelledError:
            if self.transport is not None:
                raise
        finally:
            self._task = None

    async def _serve(self, request: Request) -> None:
        self._arrived = self.gateway.now()
        answer = self.gateway.answer(request)
        if answer is not None:
            self.write(answer)
            return
        self.gateway.metrics.received.inc()
        await self._proxy(request)

    async def _proxy(self, request: Request) -> None:
        """Offer the request to replicas until one has answered."""
        tried: list[Replica] = []
        reason = "none is ready"
        balancer, config = self.gateway.balancer, self.gateway.config
        deadline = self._arrived + config.wait_s
        while len(tried) < config.tries:
            replica = balancer.choose(request.body, tried) or await self._wait(request, tried, deadline)
            if replica is None:
                break
            tried.append(replica)
            # Asked when the answer comes: another replica may be ready by then.
            last = partial(self._last, tried)
            balancer.learn(request.body, replica)
            try:
                if await self._try(request, replica, last):
                    return
                reason = f"{replica.name} is busy or draining"
            except ReplicaLost as problem:
                reason = f"{replica.name}: {problem}"
            self.gateway.metrics.retries.inc()
        self.gateway.metrics.count("none", _BUSY)
        message = f"no replica could take the request ({reason}; {len(tried)} tried)"
        self.write(messages.error(_BUSY, message, extra=[("retry-after", "1")]))

    def _last(self, tried: list[Replica]) -> bool:
        return len(tried) == self.gateway.config.tries or not self.gateway.balancer.candidates(tried)

    async def _wait(self, request: Request, tried: list[Replica], deadline: float) -> Replica | None:
        """Wait for a replica: one not tried at once, one tried before after a moment (it may have been
        replaced).
        """
        again = self.gateway.now() + _AGAIN_S
        with self.gateway.waiting() as admitted:
            while admitted and not self.gateway.stopping and (left := deadline - self.gateway.now()) > 0:
                await self.gateway.changed(min(left, _AGAIN_S))
                passed_over = tried if self.gateway.now() < again else ()
                if replica := self.gateway.balancer.choose(request.body, passed_over):
                    return replica
        return None

    async def _try(self, request: Request, replica: Replica, last: Callable[[], bool]) -> bool:
        """One try. True: the client has its answer, or the error it can have; False: try another replica."""
        replica.breaker.sent()
        replica.inflight += 1
        exchange: Exchange | None = None
        try:
            exchange = await self._exchange(request, replica, last)
        except ReplicaLost as problem:
            replica.failed += 1
            replica.breaker.failed()
            if self.exchange is not None and self.exchange.started:
                self.gateway.metrics.count(replica.name, 502)
                self.exchange.break_off(str(problem))
                request.keep_alive = False
                return True
            raise
        except asyncio.CancelledError:
            replica.breaker.abandoned()
            self.gateway.metrics.count(replica.name, 499)
            raise
        finally:
            replica.inflight -= 1
            self.exchange = None
        replica.served += 1
        replica.breaker.succeeded()
        if not exchange.busy:
            self.gateway.metrics.count(replica.name, exchange.status)
        return not exchange.busy

    async def _exchange(self, request: Request, replica: Replica, last: Callable[[], bool]) -> Exchange:
        """Send the request and see the answer through. Raises ReplicaLost."""
        data = request.render(replica.host, self._peer)
        upstream = await replica.pool.acquire()
        for attempt in (0, 1):
            fresh = attempt == 1 or upstream.fresh
            self.exchange = exchange = Exchange(self, request, replica, upstream, last)
            try:
                upstream.send(data, exchange, bodiless=request.method == b"HEAD")
                await exchange.done
                replica.pool.release(upstream)
                return exchange
            except ReplicaLost:
                # A kept connection may have been closed by the replica just as it was taken: no failure of
                # the replica.
                if fresh or exchange.started or exchange.status:
                    raise
                upstream = await replica.pool.connect()
            except asyncio.CancelledError:
                upstream.abort()
                raise
        raise AssertionError("unreachable")

    def check_idle(self, now: float) -> None:
        """Give up an exchange whose replica has been silent too long."""
        exchange = self.exchange
        if (
            exchange is not None
            and now - exchange.upstream.last_activity > self.gateway.config.idle_timeout_s
        ):
            exchange.upstream.abort()
            with contextlib.suppress(asyncio.InvalidStateError):
                exchange.lost(f"no byte for {self.gateway.config.idle_timeout_s:g} s")
