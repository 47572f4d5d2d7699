"""Exchanges of a proxy with the servers behind it: HTTP/1.1 over connections that are kept for a moment.

The fleet's gateway and `farthing serve --models` share this module. An exchange through a general HTTP client
takes longer than everything else that a proxy does for a request.

A connection carries another exchange only if its last answer ended exactly where its framing says and nothing
was received since: bytes that a server sends unasked close the connection and reach no client.
"""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httptools
from multidict import CIMultiDict

# RFC 9110 section 7.6.1: hop-by-hop fields, framing and Host, which each side writes itself.
_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "expect",
        "content-length",
        "host",
    ]
)
_IDLE_S = 3.0  # a kept connection; servers on uvicorn close theirs after 5 seconds
_MAX_HEAD = 64 << 10  # bytes of an answer's head
_MAX_BODY = 64 << 20  # bytes that `get` reads
_AHEAD = 256 << 10  # bytes of a body received before the client takes them


class ReplicaLost(Exception):
    """A failed exchange. reached: the server received at least part of the request."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


def end_to_end(headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    """The headers that a proxy passes on."""
    headers = list(headers)
    connection = (value for name, value in headers if name.lower() == "connection")
    named = {token.strip().lower() for value in connection for token in value.split(",")}
    return CIMultiDict(
        # Bytes that are not UTF-8 cannot be re-encoded.
        (name, value.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        for name, value in headers
        if (lower := name.lower()) not in _HOP and lower not in named
    )


def request_headers(headers: Iterable[tuple[str, str]], peer: str) -> CIMultiDict[str]:
    """The headers of a request to forward: the end-to-end ones, and the client in X-Forwarded-For."""
    passed = end_to_end(headers)
    forwarded = passed.popall("X-Forwarded-For", [])
    passed["X-Forwarded-For"] = ", ".join([*forwarded, peer])
    return passed


class _Connection(asyncio.Protocol):
    """A connection to a server, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.answer: Answer | None = None  # of the exchange in flight
        self.transport: Any = None  # asyncio's; None once the connection is lost
        self.answered = False  # bytes were received in the exchange that failed
        self.idle_since = 0.0  # loop time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.answer is not None:
            self.answer.ended(exc)

    def data_received(self, data: bytes) -> None:
        if self.answer is not None:
            self.answer.feed(data)
        else:
            self.close()  # unsolicited

    @property
    def quiet(self) -> bool:
        """Whether it is open and nothing was received, not even bytes that the event loop has yet to read."""
        return self.transport is not None and not self.transport.is_closing() and not self._poll.poll(0)

    def close(self) -> None:
        """Close immediately, which ends an exchange in flight."""
        if self.transport is not None:
            self.transport.abort()


class Answer:
    """The answer to one request: its head, and its body as it arrives."""

    def __init__(self, upstream: Upstream, url: str, connection: _Connection, *, bodiless: bool) -> None:
        """bodiless: the request's method is HEAD."""
        self._upstream, self._url, self._connection, self._bodiless = upstream, url, connection, bodiless
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._parts: list[bytes] = []
        self._ahead = 0  # bytes in `_parts`
        self._head = 0  # bytes of header fields
        self._opened = False  # the head is complete
        self._framed = False  # the body does not end with the connection
        self._complete = False
        self._reusable = False
        self._problem: str | None = None
        self.received = 0  # bytes
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        connection.answer = self

    async def opened(self) -> None:
        """Wait for the head. Raises ReplicaLost."""
        while not self._opened:
            await self._wait()
        if self.status < 200:
            raise ReplicaLost(f"unexpected status {self.status}", reached=True)

    async def part(self) -> bytes:
        """The next bytes of the body; empty at its end. Raises ReplicaLost."""
        while not self._parts:
            if self._complete:
                return b""
            await self._wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if self._ahead > _AHEAD and self._connection.transport is not None:
            self._connection.transport.resume_reading()
        self._ahead = 0
        return data

    async def read(self, limit: int) -> bytes:
        """The body, up to the part that reaches `limit` bytes. Raises ReplicaLost."""
        body = bytearray()
        while len(body) < limit and (data := await self.part()):
            body += data
        return bytes(body)

    def close(self) -> None:
        """End the exchange. Its connection is kept if the answer was received completely and in order."""
        self._connection.answer = None
        transport = self._connection.transport
        unsent = transport is None or transport.is_closing() or transport.get_write_buffer_size()
        if self._complete and self._reusable and not self._parts and not unsent:
            self._upstream.keep(self._url, self._connection)
        else:
            self._connection.close()

    async def _wait(self) -> None:
        if self._problem is not None:
            raise ReplicaLost(self._problem, reached=True)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._upstream.silence):
                await self._waiter
        except TimeoutError as problem:
            why = f"nothing was received for {self._upstream.silence:g} s"
            raise ReplicaLost(why, reached=True) from problem

    # ---- called by the connection ----

    def feed(self, data: bytes) -> None:
        """Parse received bytes."""
        self.received += len(data)
        if self._complete:
            self._reusable = False
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as problem:
            self._fail(f"the answer is malformed: {problem}")
        if not self._opened and self.received > _MAX_HEAD:
            self._fail(f"the head of the answer exceeds {_MAX_HEAD} bytes")
        if self._ahead > _AHEAD and self._connection.transport is not None:
            self._connection.transport.pause_reading()
        self._wake()

    def ended(self, exc: Exception | None) -> None:
        """The connection is closed: the end of a body without a length, or of the exchange."""
        if self._opened and not self._framed and exc is None:
            self._complete = True
        self._fail(str(exc or "the connection was closed"))
        self._wake()

    def _fail(self, problem: str) -> None:
        self._reusable = False
        if not self._complete and self._problem is None:
            self._problem = problem
            self._connection.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- called by the parser ----

    def on_message_begin(self) -> None:
        self._reusable = self._reusable and not self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._opened:  # a trailer
            return
        self._head += len(name) + len(value)
        if self._head > _MAX_HEAD:
            raise ValueError("the head is too long")
        self.headers.add(name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        if self._opened:  # of another, unsolicited answer
            return
        self.status = self._parser.get_status_code()
        if 100 <= self.status < 200 and self.status != 101:  # the answer is still to come
            self.headers.clear()
            return
        self._opened = True
        length, codings = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding", "")
        self._framed = length is not None or "chunked" in codings.lower()
        self._complete = self._bodiless  # the parser does not know, and waits for a body

    def on_body(self, data: bytes) -> None:
        if not self._complete:
            self._parts.append(data)
            self._ahead += len(data)

    def on_message_complete(self) -> None:
        if self._opened and not self._complete:
            self._complete, self._reusable = True, self._parser.should_keep_alive()


class Upstream:
    """The connections of a proxy to its servers."""

    def __init__(self, connect_timeout: float, silence: float) -> None:
        """Times in seconds. silence: without a byte of an answer, after which the exchange has failed."""
        self.silence = silence
        self._connect_timeout = connect_timeout
        self._idle: dict[str, list[_Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._addresses: dict[str, tuple[str, int, str, bool]] = {}  # url -> host, port, Host header, TLS

    async def send(
        self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Answer:
        """Send a request to the server at `url` and wait for the head of the answer. Raises ReplicaLost.

        target: path and query, as received. A server may close an idle connection just as a request is sent:
        if a kept one ends before a byte of the answer, the request is sent once more, on a new connection.
        """
        request = self._request(url, method, target, headers, body)
        kept = self._kept(url)
        if kept is not None:
            try:
                return await self._exchange(url, kept, request)
            except ReplicaLost:
                if kept.answered:
                    raise
        try:
            return await self._exchange(url, await self._connect(url), request)
        except ReplicaLost as problem:
            # A server that is gone now may have died of the request that was sent to it before.
            raise problem if kept is None else ReplicaLost(str(problem), reached=True) from problem

    async def get(
        self, url: str, target: str, headers: Mapping[str, str] | None = None, *, timeout: float = 2.0
    ) -> tuple[int, bytes]:
        """Status and body of a GET. timeout: seconds for all of it. Raises ReplicaLost."""
        try:
            async with asyncio.timeout(timeout):
                answer = await self.send(url, "GET", target, headers or {})
                try:
                    return answer.status, await answer.read(_MAX_BODY)
                finally:
                    answer.close()
        except TimeoutError as problem:
            raise ReplicaLost(f"no answer within {timeout:g} s", reached=True) from problem

    async def status(self, url: str, target: str) -> int | None:
        """The status of a GET; None without an answer."""
        try:
            return (await self.get(url, target))[0]
        except ReplicaLost:
            return None

    async def _exchange(self, url: str, connection: _Connection, request: bytes) -> Answer:
        answer = Answer(self, url, connection, bodiless=request.startswith(b"HEAD "))
        try:
            if connection.transport is None:  # closed as soon as it was opened
                answer.ended(None)
            else:
                connection.transport.write(request)
            await answer.opened()
        except BaseException:
            connection.answered = answer.received > 0
            answer.close()
            raise
        return answer

    async def _connect(self, url: str) -> _Connection:
        host, port, _, tls = self._address(url)
        try:
            async with asyncio.timeout(self._connect_timeout):
                loop = asyncio.get_running_loop()
                return (await loop.create_connection(_Connection, host, port, ssl=tls or None))[1]
        except (OSError, TimeoutError) as problem:
            why = str(problem) or f"no answer within {self._connect_timeout:g} s"
            raise ReplicaLost(f"cannot connect to {url} ({why})", reached=False) from problem

    def _request(self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._address(url)[2]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")
        text = "\n".join(lines)
        if text.count("\n") >= len(lines) or "\r" in text or "\0" in text:
            raise ValueError("a line break within a header")
        head = text.replace("\n", "\r\n") + "\r\n\r\n"
        return head.encode("utf-8", "surrogateescape") + body

    def _address(self, url: str) -> tuple[str, int, str, bool]:
        known = self._addresses.get(url)
        if known is None:
            parts = urlsplit(url)
            tls = parts.scheme == "https"
            port = parts.port or (443 if tls else 80)
            known = self._addresses[url] = (parts.hostname or "", port, parts.netloc, tls)
        return known

    # ---- kept connections ----

    def keep(self, url: str, connection: _Connection) -> None:
        """Keep a connection for the next exchange."""
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(url, []).append(connection)
        if self._sweep is None:
            self._sweep = loop.call_later(_IDLE_S, self._close_idle)

    def _kept(self, url: str) -> _Connection | None:
        """The connection that was used last, if it is still open."""
        idle = self._idle.get(url, [])
        while idle:
            connection = idle.pop()
            if connection.quiet:
                return connection
            connection.close()
        return None

    def _close_idle(self) -> None:
        """Close the connections that have been idle for too long."""
        loop = asyncio.get_running_loop()
        before = loop.time() - _IDLE_S
        for url, idle in list(self._idle.items()):
            for connection in idle:
                if connection.idle_since <= before:
                    connection.close()
            self._idle[url] = [each for each in idle if each.idle_since > before]
            if not self._idle[url]:
                del self._idle[url]
        self._sweep = loop.call_later(_IDLE_S / 2, self._close_idle) if self._idle else None

    def close(self) -> None:
        """Close the idle connections."""
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()


# Which server stores a response.

_PATH = re.compile(r"/v1/responses/(?!input_tokens\b|compact\b)([^/?]+)")
_LONGEST = 128  # characters of an id
_PASSED = ("Authorization", "X-Api-Key")
_TIMEOUT_S = 1.0


def named(target: str) -> str | None:
    """The id of a response in a request's target, as it is written there; None if there is none."""
    match = _PATH.match(target)
    return match[1] if match is not None else None


async def holder(
    upstream: Upstream, urls: Sequence[str], identity: str, headers: Mapping[str, str]
) -> int | None:
    """The index of the server that answers for a response, with the credentials in `headers`; None if none
    does."""
    if len(identity) > _LONGEST:
        return None
    passed = {name: headers[name] for name in _PASSED if name in headers}
    path = f"/v1/responses/{quote(identity, safe='%')}"

    async def stores(url: str) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await upstream.send(url, "GET", path, passed)
            answer.close()
            return answer.status == 200
        except (ReplicaLost, TimeoutError):
            return False

    stored = await asyncio.gather(*map(stores, urls))
    return stored.index(True) if True in stored else None
