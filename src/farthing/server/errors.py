"""Errors in the format of the API that was called, with the types and codes of its publisher.

OpenAI: {"error": {"message", "type", "param", "code"}}. Anthropic, for /v1/messages: {"type": "error",
"error": {"type", "message"}}. Ollama, for /api/…: {"error": message}. All have the header X-Error-Code, the
code or this server's own reason, for gateways and operators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_OPENAI_TYPES = {429: "requests", 503: "service_unavailable_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {405: "method_not_supported", 429: "rate_limit_exceeded"}  # of OpenAI's errors that give no other
ANTHROPIC_PATH = "/v1/messages"
CODE_HEADER = "X-Error-Code"
_TAIL = 32  # bytes kept from the end of a stream
OPENING_HEADER = "X-Farthing-Opens-After"  # of requests: the seconds in which a gateway can retry
UNAUTHORIZED_HEADERS = {"WWW-Authenticate": "Bearer"}


Documented = dict[int | str, dict[str, Any]]  # responses in the OpenAPI document, by status
STATUSES = (400, 401, 404, 405, 408, 413, 429, 500, 503, 504)  # of the errors of generation


class ClientGone(Exception):
    """The client closed its connection, so no response is possible."""


class ClientTooSlow(Exception):
    """The client left its answer unread until the deadline: the connection is closed within the answer."""


class ApiError(Exception):
    """An error response.

    code, kind: OpenAI's code and type. reason: this server's own name for the error. retry_after: whole
    seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        reason: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        fault = "invalid_request_error" if status < 500 else "server_error"
        self.kind = kind or _OPENAI_TYPES.get(status, fault)
        self.reason = reason or self.code
        self.retry_after = retry_after

    def payload(self) -> dict[str, Any]:
        """The JSON document."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body(self, anthropic: bool = False) -> str:
        """The document as ASCII JSON, because a message may quote characters that UTF-8 cannot encode."""
        return json.dumps(anthropic_payload(self) if anthropic else self.payload())

    def response(self, scope: Scope) -> Response:
        """The HTTP response to a request."""
        headers = dict(UNAUTHORIZED_HEADERS) if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.reason is not None:
            headers[CODE_HEADER] = self.reason
        anthropic = is_anthropic(scope["path"]) or _from_anthropic(scope)
        ollama = scope["path"].startswith("/api/")
        text = json.dumps({"error": self.message}) if ollama else self.body(anthropic)
        return Response(text, self.status, headers, media_type="application/json")


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path in (ANTHROPIC_PATH, "/v1/complete") or path.startswith(ANTHROPIC_PATH + "/")


def _from_anthropic(scope: Scope) -> bool:
    """Whether Anthropic's SDK sent a request, perhaps to a path that both APIs have."""
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def anthropic_payload(error: ApiError) -> dict[str, Any]:
    """The JSON document of /v1/messages."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond from a middleware."""
    await error.response(scope)(scope, receive, send)


class Passage:
    """The body of an answer that a proxy passes on, and what ends it if its server is lost on the way.

    The client of a stream is told by an error, as the last event or, in Ollama's API, line. Any other body
    can only be broken off.
    """

    def __init__(self, headers: Mapping[str, str], target: str) -> None:
        """headers: of the answer; names are found in any case. target: of the request."""
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.events, self._lines = kind == "text/event-stream", kind == "application/x-ndjson"
        self._path, self._tail = target.partition("?")[0], b""

    def passed(self, data: bytes) -> None:
        """The client received these bytes."""
        self._tail = data[-_TAIL:] if len(data) >= _TAIL else (self._tail + data)[-_TAIL:]

    @property
    def done(self) -> bool:
        """Whether the stream ended as OpenAI's do."""
        return b"[DONE]" in self._tail

    def ending(self, message: str) -> bytes | None:
        """What tells the client that no more will come; None for a body that has no place for it."""
        if self._lines:
            line = f"{json.dumps({'error': message})}\n".encode()
            return line if self._tail[-1:] in (b"", b"\n") else b"\n" + line
        if not self.events:
            return None
        anthropic = is_anthropic(self._path)
        named = "event: error\n" if anthropic or self._path == "/v1/responses" else ""
        document = json.loads(ApiError(502, message).body(anthropic)) | ({"type": "error"} if named else {})
        # The blank line ends an event of which only a part was passed on.
        return f"\n\n{named}data: {json.dumps(document)}\n\n".encode()
