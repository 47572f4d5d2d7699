"""Every response carries an id of its request, under the names that the publishers' SDKs read."""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIELDS = (b"x-request-id", b"request-id")  # OpenAI's, Anthropic's
_USABLE = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware that adds the client's own X-Request-Id, or a new id, to the response's head."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request and name it in its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_FIELDS[0], b"")
        identity = given if _USABLE.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((field, identity) for field in _FIELDS)]
            await send(message)

        await self.app(scope, receive, name)
