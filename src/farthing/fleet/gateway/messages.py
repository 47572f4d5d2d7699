"""HTTP/1.1 messages as the gateway reads and writes them: bytes in, bytes out, no interpretation of
bodies.
"""

from __future__ import annotations

import http
import json
from collections.abc import Iterable
from dataclasses import dataclass

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1: these concern one hop. Content-Length is written anew on requests.
_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
    }
)
_REASONS = {int(status): status.phrase.encode() for status in http.HTTPStatus}
LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Request:
    """One request, its body read whole: it may have to be sent twice."""

    method: bytes
    target: bytes  # path and query as received
    version: str  # "1.1" or "1.0"
    headers: Headers  # names in lower case
    body: bytes = b""
    keep_alive: bool = True

    @property
    def path(self) -> str:
        return self.target.split(b"?", 1)[0].decode("latin-1")

    @property
    def query(self) -> str:
        """What stands behind the question mark."""
        return self.target.partition(b"?")[2].decode("latin-1")

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header (name in lower case), None where it is absent."""
        return next((value for key, value in self.headers if key == name), None)

    def render(self, host: bytes, peer: bytes) -> bytes:
        """The bytes for a replica at `host` ("127.0.0.1:8001"), naming the client `peer` in
        X-Forwarded-For.
        """
        lines = [b"%s %s HTTP/%s" % (self.method, self.target, self.version.encode()), b"host: " + host]
        forwarded = peer
        for name, value in _end_to_end(self.headers):
            if name == b"x-forwarded-for":
                forwarded = value + b", " + peer
            elif name not in (b"host", b"content-length"):
                lines.append(name + b": " + value)
        lines.append(b"x-forwarded-for: " + forwarded)
        if self.body or self.method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"content-length: %d" % len(self.body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


@dataclass(slots=True)
class ResponseHead:
    """Status and headers of a replica's answer.

    `length` is None where the body ends by chunks or by the connection.
    """

    status: int
    headers: Headers
    length: int | None

    @property
    def is_event_stream(self) -> bool:
        return any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers
        )

    def render(self, replica: str, *, chunked: bool, close: bool) -> bytes:
        """The bytes for the client. The body keeps its length or is framed in chunks anew."""
        lines = [b"HTTP/1.1 %d %s" % (self.status, _REASONS.get(self.status, b""))]
        lines += [name + b": " + value for name, value in _end_to_end(self.headers)]
        lines.append(b"x-farthing-replica: " + replica.encode("latin-1"))
        if chunked:
            lines.append(b"transfer-encoding: chunked")
        if close:
            lines.append(b"connection: close")
        return b"\r\n".join(lines) + b"\r\n\r\n"


def _end_to_end(headers: Headers) -> Iterable[tuple[bytes, bytes]]:
    named = {
        token.strip().lower() for key, value in headers if key == b"connection" for token in value.split(b",")
    }
    return ((name, value) for name, value in headers if name not in _HOP and name not in named)


def chunk(data: bytes) -> bytes:
    """One HTTP chunk (RFC 9112 section 7.1); `data` must not be empty."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def error_body(status: int, message: str) -> bytes:
    """An error in the shape OpenAI's clients parse."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def response(
    status: int,
    body: bytes,
    *,
    content_type: str = "application/json",
    extra: Iterable[tuple[str, str]] = (),
    close: bool = False,
) -> bytes:
    """A whole answer of the gateway's own."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, b'').decode()}", f"content-type: {content_type}"]
    lines += [f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in extra)]
    if close:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def error(status: int, message: str, *, extra: Iterable[tuple[str, str]] = (), close: bool = False) -> bytes:
    """A whole error answer."""
    return response(status, error_body(status, message), extra=extra, close=close)


def stream_error(message: str) -> bytes:
    """The last event of an SSE stream that broke: an error a client can parse, in place of silence."""
    return b"data: " + error_body(502, message) + b"\n\n"
