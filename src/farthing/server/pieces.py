"""Large JSON answers in pieces, so that writing one does not block the event loop.

A document may contain `Pieces`: JSON text that is generated while it is sent, about a millisecond at a time.
The event loop generates one piece per iteration, for any number of requests, and sends it before the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from farthing.server.events import to_json
from farthing.server.pacing import FairLock

SIZE = 32_768  # minimum characters of a piece


class Pieces:
    """The JSON text of one value as an iterable of pieces, which can be read once."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts


def listed(items: Iterable[str]) -> Iterator[str]:
    """The texts of an array of JSON texts."""
    yield "["
    comma = ""
    for item in items:
        yield comma + item
        comma = ","
    yield "]"


def texts(document: Any) -> Iterator[str]:
    """The JSON text of a document that may contain `Pieces`."""
    if isinstance(document, Pieces):
        yield from document.texts
    elif isinstance(document, Mapping):
        opening = "{"
        for key, value in document.items():
            yield f"{opening}{to_json(key)}:"
            yield from texts(value)
            opening = ","
        yield "}" if opening == "," else "{}"
    elif isinstance(document, list):
        opening = "["
        for value in document:
            yield opening
            yield from texts(value)
            opening = ","
        yield "]" if opening == "," else "[]"
    else:
        yield to_json(document)


def event(document: Any) -> Iterator[str]:
    """The texts of an unnamed event."""
    yield "data: "
    yield from texts(document)
    yield "\n\n"


class Turns:
    """Takes turns between requests that write pieces, and between their clients."""

    def __init__(self) -> None:
        self._lock = FairLock()

    async def pieces(self, source: Iterable[str], client: str) -> AsyncIterator[str]:
        """Yield texts joined to pieces of SIZE characters, one per iteration of the event loop."""
        texts = iter(source)
        while True:
            await self._lock.acquire(client)
            try:
                piece = _next(texts)
                await asyncio.sleep(0)
            finally:
                self._lock.release()
            if not piece:
                return
            yield piece


def _next(texts: Iterator[str]) -> str:
    """The next texts, together at least SIZE characters; "" at the end."""
    taken: list[str] = []
    size = 0
    for text in texts:
        taken.append(text)
        size += len(text)
        if size >= SIZE:
            break
    return "".join(taken)


class PiecedAnswer(StreamingResponse):
    """A JSON document, sent in pieces within `seconds`. Slower clients are disconnected."""

    media_type = "application/json"

    def __init__(self, document: Any, turns: Turns, client: str, seconds: float) -> None:
        super().__init__(turns.pieces(texts(document), client))
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the document."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
