"""`connections.Guarded` on httptools; where it is not installed, importing this raises ImportError."""

from __future__ import annotations

from typing import Any, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from farthing.server.chunks import TOO_FINE, too_fine
from farthing.server.connections import Guarded

_PIPELINED = 32  # requests of one connection queued after the one being answered
_TRAILERS = 64  # fields after a chunked body, which are ignored


class GuardedHttpTools(Guarded, HttpToolsProtocol):  # type: ignore[misc]  # two kinds of cycle
    """On httptools."""

    _in_body = False
    _overrun = False
    _problem = ""
    _chunks = _body_bytes = _trailers = 0

    def on_headers_complete(self) -> None:
        """Handle a complete head. After too many pipelined requests parsing ends; accepted ones are answered.

        A packet may contain thousands of requests, and uvicorn parses all of them before it pauses reading.
        """
        if len(self.pipeline) >= _PIPELINED:
            newest: Any = self.cycle
            newest.keep_alive = False  # its response closes the connection
            self._overrun = True
            raise OverflowError(f"more than {_PIPELINED} pipelined requests")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._reject("expected HTTP/1.1")
        self._in_body = True
        self._chunks = self._body_bytes = self._trailers = 0
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header. Trailers are ignored: the application has already read the headers."""
        if not self._in_body:
            super().on_header(name, value)
            return
        self._trailers += 1
        if self._trailers > _TRAILERS:
            self._reject(f"expected at most {_TRAILERS} trailers")

    def on_chunk_header(self) -> None:
        """Count a chunk of a body."""
        self._chunks += 1
        if too_fine(self._chunks, self._body_bytes):
            self._reject(TOO_FINE)

    def on_body(self, body: bytes) -> None:
        """Handle a part of a body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Handle a complete body."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject input that cannot be parsed."""
        if not self._overrun:
            super().send_400_response(self._problem or msg)

    def _reject(self, problem: str) -> NoReturn:
        """End parsing from within a callback of the parser."""
        self._problem = problem
        raise ValueError(problem)

    def _reading_body(self) -> bool:
        return self._in_body
