"""Work that holds the event loop for long, one request at a time and with pauses, clients in turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class FairLock:
    """A lock whose waiting clients take turns, however many requests each of them has waiting."""

    def __init__(self) -> None:
        self._held = False
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first is next

    async def acquire(self, client: str) -> None:
        """Wait for the lock."""
        if not self._held:
            self._held = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was handed over meanwhile
                self.release()
            raise

    def release(self) -> None:
        """Hand the lock to the next client's first request."""
        while self._queues:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # at the back
            if not turn.done():
                turn.set_result(None)
                return
        self._held = False
