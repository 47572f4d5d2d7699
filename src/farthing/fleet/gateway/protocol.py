"""aiohttp's server protocol, guarded, with errors in the API's format."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from farthing.fleet.gateway.errors import Refused, error_response, summary
from farthing.fleet.gateway.guard import Door, Guard, guard_of

log = logging.getLogger(__name__)

_MAX_LINE, _MAX_FIELDS = 16 << 10, 100  # bytes per request line or header field, and number of fields
_LINGER_S = 2.0  # for a client to read an error while still sending its body


class Protocol(web.RequestHandler):
    """One client connection."""

    __slots__ = ()

    def problem(self, body: aiohttp.StreamReader) -> str | None:
        """Why the parser gave up within this body of the current request; None if it did not.

        aiohttp queues the error as if it were the next request, and the handler waits for the body forever.
        """
        if not self._messages or body.is_eof():
            return None
        return summary(getattr(self._messages[0][0], "message", ""))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP and internal errors."""
        if isinstance(exc, HttpProcessingError):
            guard = guard_of(request)
            if guard is not None:
                status = 431 if isinstance(exc, LineTooLong) else 400
                guard.refuse(status, f"request is malformed: {summary(message or '')}")
            raise ConnectionError("malformed request")
        if isinstance(exc, ConnectionError):
            raise exc  # by the lines above: the client has its answer, and the connection closes
        log.error("request failed: %s %s", request.method, request.path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has already started")
        return error_response(Refused(status, "internal error of the gateway", close=True), request.path)


def make_factory(
    door: Door, handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
) -> Callable[[], Guard]:
    """A factory of client connections whose requests `handle` answers."""
    server = web.Server(handle, request_factory=_begin, handler_cancellation=True)

    def make() -> Guard:
        protocol = Protocol(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            lingering_time=_LINGER_S,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_FIELDS,
        )
        return Guard(door, protocol)

    return make


def _begin(
    message: Any, payload: Any, protocol: web.RequestHandler, writer: Any, task: asyncio.Task[None]
) -> web.BaseRequest:
    """Create aiohttp's request once its head is complete."""
    request = web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())
    guard = guard_of(request)
    if guard is not None:
        length = None if message.chunked else int(message.headers.get("Content-Length", 0))
        guard.started(payload, length)
    return request
