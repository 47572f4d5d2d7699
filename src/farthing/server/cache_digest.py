"""The prompts in this server's prefix cache, by which a gateway routes.

A gateway has no tokenizer, so the digest lists blocks of prompt text (`farthing.prompts`). A text block
belongs to the cache block that ends at the same share of the prompt, and is listed while that block, and with
it the whole prefix, is in the cache.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.engine.sequence import PrefixCache
from farthing.prompts import BLOCK, read_prompt

if TYPE_CHECKING:
    from farthing.engine.core import EngineCore
    from farthing.engine.engine import Engine

_ENTRIES = 1 << 15  # text blocks remembered
_BLOCKS = 1024  # of one prompt
_PENDING = 512  # requests remembered between two reads of the digest
_PENDING_BYTES = 16 << 20  # total size of their bodies
_SMOOTHING = 0.1  # of the mean size of prompts
_READ_S = 60.0  # without a reader for this long, nothing is remembered

_body: ContextVar[bytes] = ContextVar("body", default=b"")


@dataclass(frozen=True, slots=True)
class _Seen:
    body: bytes
    tokens: Sequence[int]
    salt: str


class CacheDigest:
    """Maps blocks of prompt text to blocks of the prefix cache."""

    def __init__(self) -> None:
        self.mean_bytes = 0.0  # of prompt text, over the recent requests
        self._pending: deque[_Seen] = deque(maxlen=_PENDING)
        self._pending_bytes = 0
        self._known: OrderedDict[int, bytes] = OrderedDict()  # text block -> hash of the cache block
        self._turn = asyncio.Lock()
        self.is_read = False  # otherwise nothing is to be kept or remembered
        self._unread: asyncio.TimerHandle | None = None

    def keep(self, body: bytes) -> None:
        """Keep the body of the current request for `remember`."""
        _body.set(body)

    def remember(self, prompts: Sequence[Sequence[int]], salt: str) -> None:
        """Note that prompts of the current request were submitted to the engine."""
        body = _body.get()
        for tokens in prompts if body else ():
            if self._pending_bytes + len(body) <= _PENDING_BYTES:
                self._pending_bytes += len(body)
                self._pending.append(_Seen(body, tokens, salt))

    async def blocks(self, engine: Engine) -> list[int]:
        """The text blocks whose prefix is in the cache, least recently used first."""
        if self._unread is not None:
            self._unread.cancel()
        self.is_read = True
        self._unread = asyncio.get_running_loop().call_later(_READ_S, self._rest)
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

    def _rest(self) -> None:
        self.is_read = False
        self._pending.clear()
        self._pending_bytes = 0

    def _settle(self, pending: deque[_Seen], size: int) -> None:
        """Hash the prompts since the last read. Runs in a thread: a long prompt takes a millisecond."""
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
