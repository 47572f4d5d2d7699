"""One exchange with one replica: send a request, relay its answer.

Each exchange uses its own connection. A reused connection could contain unsolicited bytes from a replica,
which would become part of the next client's answer; and only on a fresh one is it certain whether the replica
received the request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from farthing.fleet.gateway.active import Active
from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.errors import error_event
from farthing.fleet.gateway.guard import guard_of
from farthing.fleet.gateway.poison import Identity
from farthing.fleet.gateway.replicas import Replica
from farthing.fleet.gateway.stored import named
from farthing.prompts import Prompt
from farthing.server.errors import CODE_HEADER, OPENING_HEADER

BUSY: Final = 503  # answered before the first token by a replica that drains or is full
_WHOLE = 1 << 20  # bytes; shorter answers of known length are read completely before relaying
_REFUSAL = 16 << 10  # maximum bytes of an error answer to inspect
_OPENS_AFTER = "15"  # seconds of a long prompt in which the request can still go to another replica
_TAIL = 32  # bytes kept from the end of a stream to check for [DONE]
# RFC 9110 section 7.6.1: hop-by-hop fields. The HTTP library writes framing and Host.
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


class ReplicaLost(Exception):
    """A failed exchange. held: the replica received at least part of the request."""

    def __init__(self, reason: str, *, held: bool) -> None:
        super().__init__(reason)
        self.held = held


@dataclass(frozen=True)
class Outgoing:
    """A request to forward to a replica."""

    method: str
    target: str  # path and query, as received
    headers: CIMultiDict[str]
    body: bytes
    prompt: Prompt

    @property
    def streamed(self) -> bool:
        """Whether the request is for a stream."""
        return self.prompt.streamed

    @property
    def earlier(self) -> str | None:
        """The id of a stored response that the request names, in its path or its body."""
        return named(self.target) or self.prompt.previous

    @property
    def identity(self) -> Identity:
        """The key of requests that are equal to a replica."""
        return self.method, self.target, self.body


def request_headers(request: web.BaseRequest, peer: str) -> CIMultiDict[str]:
    """The headers to forward: end-to-end ones, the client in X-Forwarded-For, and when streams open."""
    headers = _end_to_end(request.headers.items(), request.headers.getall("Connection", []))
    forwarded = headers.popall("X-Forwarded-For", [])
    headers["X-Forwarded-For"] = ", ".join([*forwarded, peer])
    headers[OPENING_HEADER] = _OPENS_AFTER
    return headers


def _end_to_end(headers: Iterable[tuple[str, str]], connection: Iterable[str]) -> CIMultiDict[str]:
    named = {token.strip().lower() for value in connection for token in value.split(",")}
    return CIMultiDict(
        # Bytes that are not UTF-8 cannot be re-encoded.
        (name, value.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        for name, value in headers
        if (lower := name.lower()) not in _HOP and lower not in named
    )


def make_session(config: GatewayConfig) -> aiohttp.ClientSession:
    """The HTTP client for replicas: one connection per request, no decoding, redirects or cookies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout_s, sock_read=config.idle_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
    )


async def send(
    session: aiohttp.ClientSession, replica: Replica, outgoing: Outgoing
) -> aiohttp.ClientResponse:
    """Send the request and wait for the head of the answer. Raises ReplicaLost."""
    try:
        answer = await session.request(
            outgoing.method,
            URL(replica.url + outgoing.target, encoded=True),
            headers=outgoing.headers,
            data=outgoing.body or None,
            allow_redirects=False,
        )
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
        raise ReplicaLost(f"cannot connect to {replica.url} ({problem})", held=False) from problem
    except (aiohttp.ClientError, OSError, TimeoutError) as problem:
        raise ReplicaLost(_describe(problem), held=True) from problem
    if answer.status < 200:
        answer.close()
        raise ReplicaLost(f"unexpected status {answer.status}", held=True)
    return answer


async def refusal(answer: aiohttp.ClientResponse) -> str:
    """The code of an error answer, or an empty string. Raises ReplicaLost."""
    if code := answer.headers.get(CODE_HEADER):
        return code
    try:
        body = await answer.content.read(_REFUSAL)
        return str(json.loads(body)["error"]["code"])
    except (aiohttp.ClientError, OSError, TimeoutError) as problem:
        raise ReplicaLost(_describe(problem), held=True) from problem
    except (ValueError, KeyError, TypeError):
        return ""


def _describe(problem: BaseException) -> str:
    if isinstance(problem, aiohttp.ServerDisconnectedError):
        return "the connection was closed"
    return str(problem) or type(problem).__name__


class Relay:
    """Relays a replica's answer to the client."""

    def __init__(
        self,
        request: web.BaseRequest,
        replica: Replica,
        answer: aiohttp.ClientResponse,
        active: Active,
        write_timeout_s: float,
    ) -> None:
        self._request, self._replica, self._answer, self._active = request, replica, answer, active
        self._write_timeout_s = write_timeout_s
        self._clock = asyncio.get_running_loop().time
        self._length = _content_length(answer)
        self.event_stream = answer.content_type == "text/event-stream"
        self.response: web.StreamResponse | None = None  # set once the head is sent to the client

    async def whole(self) -> web.Response | None:
        """The complete answer if it is short and not a stream, so that the replica may still be lost safely.

        Raises ReplicaLost, Interrupted.
        """
        if self.event_stream or self._length is None or self._length > _WHOLE:
            return None
        try:
            with self._active.interruptible():
                body = await self._answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            raise ReplicaLost(_describe(problem), held=True) from problem
        return web.Response(status=self._answer.status, headers=self._headers(), body=body)

    async def stream(self) -> web.StreamResponse:
        """Relay the answer as it arrives; a slow client slows the replica down.

        Raises ReplicaLost and Interrupted, after which the caller calls `break_off`, and OSError if the
        client is lost.
        """
        response = web.StreamResponse(status=self._answer.status, headers=self._headers())
        if self._length is not None:
            response.content_length = self._length
        await response.prepare(self._request)
        self.response = response
        tail = b""
        while data := await self._read():
            tail = (tail + data)[-_TAIL:] if len(data) < _TAIL else data[-_TAIL:]
            await self._write(response, data)
        if self.event_stream and self._unframed() and b"[DONE]" not in tail:
            raise ReplicaLost("the stream ended without [DONE]", held=True)
        await response.write_eof()
        return response

    async def break_off(self, reason: str) -> None:
        """Tell the client that a started answer will not be completed."""
        guard = guard_of(self._request)
        if self.response is not None and self.event_stream:
            self.response.force_close()
            await self.response.write(error_event(reason, self._request.path))
            await self.response.write_eof()
        elif guard is not None:
            guard.abort()

    async def _read(self) -> bytes:
        try:
            with self._active.interruptible():
                data = await self._answer.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            raise ReplicaLost(_describe(problem), held=True) from problem
        self._replica.heard = self._clock()
        return data

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if not self._request.protocol.writing_paused:
            await response.write(data)
            return
        try:
            with self._active.interruptible():
                async with asyncio.timeout(self._write_timeout_s):
                    await response.write(data)
        except TimeoutError as problem:
            raise ConnectionResetError("the client stopped reading") from problem

    def _headers(self) -> CIMultiDict[str]:
        source = self._answer.headers
        headers = _end_to_end(source.items(), source.getall("Connection", []))
        headers["X-Farthing-Replica"] = self._replica.name
        headers.setdefault("Server", "farthing")
        if (target := headers.get("Location", "")).startswith(self._replica.url + "/"):
            headers["Location"] = target.removeprefix(self._replica.url)  # not reachable for clients
        if self._request.method == "HEAD" and self._length is not None:
            headers["Content-Length"] = str(self._length)
        return headers

    def _unframed(self) -> bool:
        """Whether the body ends with the connection, which cannot be told from a killed replica."""
        return self._length is None and "chunked" not in self._answer.headers.get("Transfer-Encoding", "")


def _content_length(answer: aiohttp.ClientResponse) -> int | None:
    value = answer.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() else None
