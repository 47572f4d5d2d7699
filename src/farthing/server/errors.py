"""Errors in the format of the API that was called, with the types and codes of its publisher.

OpenAI: {"error": {"message", "type", "param", "code"}}. Anthropic, for /v1/messages: {"type": "error",
"error": {"type", "message"}}. Ollama, for /api/…: {"error": message}. All have the header X-Error-Code, the
code or this server's own reason, for gateways and operators.
"""

from __future__ import annotations

import json
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


def error_event(message: str, path: str) -> bytes:
    """The last event of an interrupted SSE stream. It starts with a blank line, which terminates a partial
    event. In Ollama's API, the last line of a stream of lines.
    """
    error = ApiError(502, message)
    if path.startswith("/api/"):
        return f"{json.dumps({'error': message})}\n".encode()
    named = "event: error\n" if is_anthropic(path) or path == "/v1/responses" else ""
    document = json.loads(error.body(is_anthropic(path))) | ({"type": "error"} if named else {})
    return f"\n\n{named}data: {json.dumps(document)}\n\n".encode()
