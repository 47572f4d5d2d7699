"""Which prompts this server holds in its prefix cache, for a gateway to route by.

A gateway has no tokenizer, so the digest names blocks of prompt text (`farthing.prompts`). Each is tied to
the cache block that ends where it ends, by its share of the text; it is listed while that block, and so the
whole prefix, can still be found in the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farthing.engine.prefix_cache import PrefixCache
from farthing.prompts import BLOCK, read_prompt

if TYPE_CHECKING:
    from farthing.engine.core import EngineCore
    from farthing.engine.engine import Engine

_ENTRIES = 1 << 15  # text blocks remembered
_BLOCKS = 1024  # of one prompt
_PENDING = 512  # requests that are remembered between two reads of the digest
_PENDING_BYTES = 16 << 20  # of their bodies
_SMOOTHING = 0.1  # of the mean size of prompts
_READ_S = 60.0  # without a reader for so long, nothing is remembered

_body: ContextVar[bytes] = ContextVar("body", default=b"")


@dataclass(frozen=True, slots=True)
class _Seen:
    body: bytes
    tokens: Sequence[int]
    salt: str


class CacheDigest:
    """Ties blocks of prompt text to blocks of the prefix cache."""

    def __init__(self) -> None:
        self.mean_bytes = 0.0  # of prompt text, over the recent requests
        self._pending: deque[_Seen] = deque(maxlen=_PENDING)
        self._pending_bytes = 0
        self._known: OrderedDict[int, bytes] = OrderedDict()  # text block -> hash of the cache block
        self._turn = asyncio.Lock()
        self._read_at = -_READ_S

    def remember(self, tokens: Sequence[int], salt: str) -> None:
        """A prompt of the request that is being served was handed to the engine."""
        body = _body.get()
        if time.monotonic() - self._read_at >= _READ_S:
            self._pending.clear()
            self._pending_bytes = 0
        elif body and self._pending_bytes + len(body) <= _PENDING_BYTES:
            self._pending_bytes += len(body)
            self._pending.append(_Seen(body, tokens, salt))

    async def blocks(self, engine: Engine) -> list[int]:
        """The text blocks whose prefix is in the cache, the least recently used first."""
        self._read_at = time.monotonic()
        async with self._turn:
            pending, self._pending = self._pending, deque(maxlen=_PENDING)
            self._pending_bytes = 0
            await asyncio.to_thread(self._settle, pending, engine.config.block_size)
            known = list(self._known.items())

            def held(core: EngineCore) -> list[int]:
                prefix = core.scheduler.prefix
                return [block for block, digest in known if prefix.match((digest,))]

            found = await asyncio.wrap_future(engine.between_steps(held))
            self._known = OrderedDict((block, self._known[block]) for block in found)
            return found

    def _settle(self, pending: deque[_Seen], size: int) -> None:
        """Hash what was seen since the last read; costs a millisecond per long prompt, hence in a thread."""
        for seen in pending:
            prompt = read_prompt(seen.body, _BLOCKS)
            self.mean_bytes += _SMOOTHING * (prompt.size - self.mean_bytes)
            hashes: list[bytes] = []
            PrefixCache(size).extend(hashes, seen.tokens, seen.salt, (len(seen.tokens) - 1) // size)
            for position, block in enumerate(prompt.blocks, 1):
                end = int(position * BLOCK / prompt.size * len(seen.tokens)) // size
                if 0 < end <= len(hashes):
                    self._known[block] = hashes[end - 1]
                    self._known.move_to_end(block)
        while len(self._known) > _ENTRIES:
            self._known.popitem(last=False)


class KeepBody:
    """ASGI middleware: keeps the body at hand for `CacheDigest.remember`; it arrives in one piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return

        async def kept() -> Message:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                _body.set(message["body"])
            return message

        await self.app(scope, kept, send)
