"""Answers on the wire: server-sent events, JSON in pieces, and fair turns of clients on the event loop."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pydantic_core
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from farthing.engine.request import INTERNAL
from farthing.server.errors import OPENING_HEADER, ApiError, ClientGone, ClientTooSlow, send_error
from farthing.server.jobs import Job
from farthing.shares import Shares

if TYPE_CHECKING:
    from farthing.server.jobs import Usage


# Fair turns between clients on the event loop, whatever their numbers of waiting requests.


class FairLock:
    """A lock with one or more places, for work that occupies the event loop."""

    def __init__(self, places: int = 1) -> None:
        self._most = self._left = places
        self._shares = Shares()  # in turns
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by client; those without any are absent

    async def acquire(self, client: str) -> None:
        """Wait for a place."""
        if self._left:
            self._left -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        self._shares.enter(client)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came, and the request was cancelled
                self.release()
            raise

    def release(self) -> None:
        """Hand a place to the first request of the client whose turn it is."""
        while self._queues:
            client = self._shares.next(self._queues)
            turn = self._queues[client].popleft()
            if not self._queues[client]:
                del self._queues[client]
            self._shares.charge(client, 1)
            self._shares.leave(client)
            if not turn.done():
                turn.set_result(None)
                return
        self._left += 1


class Gate(FairLock):
    """Lets a few requests begin per iteration of the event loop.

    Hundreds of requests in a burst would otherwise all begin in one iteration; this way they delay the next
    client's request by a few of them.
    """

    def __init__(self, per_turn: int = 2) -> None:
        super().__init__(per_turn)
        self._refilling = False

    async def enter(self, client: str) -> None:
        """Wait until a request may begin."""
        if not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)
        await self.acquire(client)

    def _refill(self) -> None:
        for _ in range(self._most - self._left):
            self.release()
        self._refilling = self._left < self._most
        if self._refilling:
            asyncio.get_running_loop().call_soon(self._refill)


# Server-sent events: the format of chunks, and the start and end of a stream.

_LAST_WORD = 5.0  # seconds for sending an error event


def encoder(default: Callable[[Any], Any] | None = None) -> Callable[[Any], str]:
    """ASCII, because clients disagree about which other characters end a line."""
    return json.JSONEncoder(separators=(",", ":"), default=default).encode


to_json = encoder()


def named(kind: str, document: Any) -> str:
    """A named event."""
    return f"event: {kind}\ndata: {to_json(document)}\n\n"


@dataclass(frozen=True, slots=True)
class Ending:
    """An API's events that are not output: after the last chunk, after an error, and during a long pause."""

    done: str
    error: Callable[[ApiError], str]
    alive: str = ": keep-alive\n\n"  # a comment, which clients skip
    media_type: str = "text/event-stream"


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """Raises ClientTooSlow where sending takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ClientTooSlow from None


_OPENS_AFTER = 1.0  # seconds without output until the API's first events are sent
_OPENING = OPENING_HEADER.lower().encode()
OPENAI = Ending("data: [DONE]\n\n", lambda error: f"data: {error.body()}\n\ndata: [DONE]\n\n")


class UsageOptions(Protocol):
    """What a client requests of the usage in a stream."""

    include_usage: bool | None  # in a last chunk
    continuous_usage_stats: bool | None  # in every chunk, too


class ChunkWriter:
    """Writes OpenAI's chunks for completions and chats: an envelope, choices, and optionally the usage."""

    def __init__(
        self, envelope: Mapping[str, Any], usage: Usage, job: Job, options: UsageOptions | None
    ) -> None:
        self._envelope, self._usage, self._job = dict(envelope), usage, job
        self.with_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)

    def chunk(self, *choices: Mapping[str, Any]) -> str:
        """A chunk with one choice, or with the usage."""
        return f"data: {to_json(self.document(*choices))}\n\n"

    def document(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        """The document of such a chunk."""
        document = self._envelope | {"choices": choices}
        if self.with_usage:
            document["usage"] = self._usage.document(self._job) if self._continuous or not choices else None
        return document


class EventStream(Response):
    """Sends text chunks as they arrive. An error before the stream opens sets the response's status, so that
    a gateway can retry on another replica; a later one becomes an event. A client that disconnects, or an
    expired deadline, cancels the job.

    The stream opens with the first chunk; or after a second with the text of `opening`, so that a client does
    not wait in silence for a long prompt. From then on, pauses of `every` seconds are filled with `alive`.
    """

    def __init__(
        self,
        job: Job,
        chunks: AsyncIterator[str],
        ending: Ending = OPENAI,
        *,
        opening: Callable[[], str] | None = None,
        every: float,
        headers: Callable[[], dict[str, str]] = dict,
    ) -> None:
        """opening: the API's first events, unless a chunk contained them; None: the API has none.
        headers: more of them, known when the stream begins."""
        self.status_code, self.media_type = 200, ending.media_type
        self.background = None
        self.job, self.chunks, self.ending, self.opening = job, chunks, ending, opening
        self._every = every
        self._sending = asyncio.Lock()
        self._begun = False
        self._sent = 0.0  # time of the last chunk
        self._more_headers = headers
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream to its end."""
        try:
            await self.job.guard(receive, self._pump(send, scope))
        except ClientGone:
            return
        except ApiError as error:
            if not self._begun:
                await send_error(error, scope, receive, send)
                return
            await self._send_error(error, send)
        except Exception as error:
            if self._begun and not isinstance(error, ClientTooSlow):
                await self._send_error(ApiError(500, INTERNAL), send)
            raise  # to the log, and to the handler that answers if nothing was sent

    async def _send_error(self, error: ApiError, send: Send) -> None:
        event = self.ending.error(error).encode()
        async with _within(_LAST_WORD):  # does not wait for a client that stopped reading
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _pump(self, send: Send, scope: Scope) -> None:
        patience = self._every if self.opening is None else min(_OPENS_AFTER, self._every)
        if (seconds := dict(scope["headers"]).get(_OPENING, b"")).isdigit():
            patience = min(60.0, float(seconds))
        self._sent = asyncio.get_running_loop().time()
        waiting = asyncio.ensure_future(self._keep_alive(send, patience))
        try:
            async for chunk in self.chunks:
                await self._send(send, chunk)
            await self._send(send, self.ending.done, more=False)
        finally:
            waiting.cancel()

    async def _keep_alive(self, send: Send, patience: float) -> None:
        """Open the stream if there is no output for `patience` seconds, and fill later pauses."""
        time = asyncio.get_running_loop().time
        while True:
            wait = self._every if self._begun else patience
            if (left := self._sent + wait - time()) > 0:
                await asyncio.sleep(left)
                continue
            opening = self.opening() if self.opening is not None else ""
            await self._send(send, opening or self.ending.alive)

    async def _send(self, send: Send, text: str, more: bool = True) -> None:
        async with self._sending:
            if not self._begun:
                self.headers.update(self._more_headers())
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._begun = True
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        self._sent = asyncio.get_running_loop().time()


# Large JSON answers in pieces, so that writing one does not block the event loop.
#
# A document may contain `Pieces`: arrays whose items are made and serialized while they are sent, about a
# millisecond at a time. The event loop writes one piece per iteration, for any number of requests, and
# sends it before the next.

SIZE = 32_768  # minimum characters of a piece


_MARK = f"pieces {secrets.token_hex(16)}"  # the place of Pieces in the rest of a document; unguessable


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


class PieceWriter:
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

    def __init__(self, document: Any, writer: PieceWriter, client: str, seconds: float) -> None:
        super().__init__(writer.pieces(texts(document), client))
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the document."""
        async with _within(self._seconds):
            await super().__call__(scope, receive, send)
