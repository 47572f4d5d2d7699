"""Server-sent events. Chunks are written by hand: a token costs one string template and one write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from json.encoder import encode_basestring_ascii as quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farthing.server.errors import ApiError, send_error
from farthing.server.jobs import ClientGone, Job

__all__ = ["EventStream", "chunk_frame", "quote"]

DONE = b"data: [DONE]\n\n"
_LAST_WORD = 5.0  # seconds for an error event to leave


def chunk_frame(identity: str, kind: str, created: int, model: str, usage: bool) -> tuple[str, str]:
    """What stands before and after a chunk's choices; they are the same for a whole stream."""
    head = f'data: {{"id":{quote(identity)},"object":"{kind}","created":{created},"model":{quote(model)},'
    return head + '"choices":[', ('],"usage":null}\n\n' if usage else "]}\n\n")


class EventStream(Response):
    """Sends text chunks as they come. An error before the first one is answered with its status, so that a
    gateway can ask another replica; a later one becomes an event of its own, followed by [DONE]. A client
    that leaves, or a deadline that passes, cancels the job."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, chunks: AsyncIterator[str]) -> None:
        self.status_code = 200
        self.background = None
        self.job = job
        self.chunks = chunks
        self._begun = False
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream to its end."""
        try:
            await self.job.guard(receive, self._pump(send))
        except ClientGone:
            return
        except ApiError as error:
            if not self._begun:
                await send_error(error, scope, receive, send)
                return
            event = f"data: {error.body()}\n\n".encode() + DONE
            with suppress(TimeoutError):  # a client that reads nothing is not waited for
                async with asyncio.timeout(_LAST_WORD):
                    await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _pump(self, send: Send) -> None:
        async for chunk in self.chunks:
            if not self._begun:
                await self._begin(send)
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        if not self._begun:
            await self._begin(send)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _begin(self, send: Send) -> None:
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
