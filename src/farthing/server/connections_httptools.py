"""`connections.Guarded` on httptools, an optional extra: importing this raises ImportError without it."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from farthing.server.connections import Guarded


class GuardedHttpTools(Guarded, HttpToolsProtocol):  # type: ignore[misc]  # two kinds of cycle
    """On httptools."""

    _in_body = False

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete."""
        self._in_body = False
        super().on_message_complete()

    def _reading_body(self) -> bool:
        return self._in_body
