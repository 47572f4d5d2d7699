"""Large JSON answers in pieces, so that writing one does not block the event loop.

A document may contain `Pieces`: arrays whose items are made and serialized while they are sent, about a
millisecond at a time. The event loop writes one piece per iteration, for any number of requests, and sends it
before the next.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pydantic_core
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from farthing.server.events import encoder, to_json
from farthing.server.pacing import FairLock

SIZE = 32_768  # minimum characters of a piece


_MARK = f"pieces {secrets.token_hex(16)}"  # stands for Pieces in the rest of a document; cannot be guessed


class Pieces:
    """An array whose items are made while it is sent; it can be read once."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def texts(self) -> Iterator[str]:
        """The JSON texts of the array, one per item."""
        yield "["
        comma = ""
        for item in self.items:
            # Four times as fast as the standard library on these many small objects.
            yield comma + pydantic_core.to_json(item, ensure_ascii=True).decode()
            comma = ","
        yield "]"


def texts(document: Any) -> Iterator[str]:
    """The JSON text of a document that may contain `Pieces`."""
    found: list[Pieces] = []

    def mark(value: object) -> str:
        if not isinstance(value, Pieces):
            raise TypeError(f"{type(value).__name__} cannot be written as JSON; expected a plain value")
        found.append(value)
        return _MARK

    first, *rest = encoder(mark)(document).split(to_json(_MARK))
    yield first
    for pieces, text in zip(found, rest, strict=True):
        yield from pieces.texts()
        yield text


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
