"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping

from aiohttp import web


class Refused(Exception):
    """A request that the gateway answers with an error.

    close: the connection closes after the answer (the body may not have been read).
    """

    def __init__(
        self, status: int, message: str, *, headers: Mapping[str, str] | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.headers, self.close = status, dict(headers or {}), close


def error_body(status: int, message: str) -> bytes:
    """The JSON document of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def error_response(refused: Refused) -> web.Response:
    """The response to a refused request."""
    response = web.Response(
        status=refused.status,
        body=error_body(refused.status, str(refused)),
        headers=refused.headers,
        content_type="application/json",
    )
    if refused.close:
        response.force_close()
    return response


def raw_error(status: int, message: str) -> bytes:
    """The bytes of an error for a connection whose request could not be parsed."""
    body = error_body(status, message)
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def error_event(message: str) -> bytes:
    """The last event of an interrupted SSE stream. It starts with a blank line, which terminates a partial
    event.
    """
    return b"\n\ndata: " + error_body(502, message) + b"\n\n"
