"""The gateway's own errors, in the shape of the API that was called."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from farthing.server.errors import ApiError, is_anthropic


def summary(problem: object) -> str:
    """The statement in a message of aiohttp's parser, without the client's bytes."""
    lines = [line.strip(" :") for line in str(problem).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("message"):  # "400, message:", then the statement
        lines = lines[1:]
    return lines[0].partition(": b'")[0][:200] if lines else "no HTTP/1.1"


class Refused(ApiError):
    """A request that the gateway answers with an error.

    close: the connection closes after the answer (the body may not have been read).
    """

    def __init__(
        self, *error: Any, headers: Mapping[str, str] | None = None, close: bool = False, **named: Any
    ) -> None:
        """error, named: as `ApiError` has them."""
        super().__init__(*error, **named)
        self.headers, self.close = dict(headers or {}), close


def error_response(refused: Refused, path: str) -> web.Response:
    """The response to a refused request of this path."""
    response = web.Response(
        status=refused.status,
        text=refused.body(is_anthropic(path)),
        headers=refused.headers,
        content_type="application/json",
    )
    if refused.close:
        response.force_close()
    return response


def raw_error(status: int, message: str) -> bytes:
    """The bytes of an error for a connection whose request could not be parsed."""
    body = ApiError(status, message).body().encode()
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
