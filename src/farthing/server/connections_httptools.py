"""`connections.Guarded` on httptools; where it is not installed, importing this raises ImportError."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from farthing.server.connections import Guarded

_PIPELINED = 32  # requests of one connection queued after the one being answered


class GuardedHttpTools(Guarded, HttpToolsProtocol):  # type: ignore[misc]  # two kinds of cycle
    """On httptools."""

    _in_body = False
    _overrun = False

    def on_headers_complete(self) -> None:
        """Handle a complete head. After too many pipelined requests parsing ends; accepted ones are answered.

        A packet may contain thousands of requests, and uvicorn parses all of them before it pauses reading.
        """
        if len(self.pipeline) >= _PIPELINED:
            newest: Any = self.cycle
            newest.keep_alive = False  # its response closes the connection
            self._overrun = True
            raise OverflowError(f"more than {_PIPELINED} pipelined requests")
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Handle a complete body."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject input that cannot be parsed."""
        if not self._overrun:
            super().send_400_response(msg)

    def _reading_body(self) -> bool:
        return self._in_body
