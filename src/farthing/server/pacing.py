"""Fair turns between clients on the event loop, whatever their numbers of waiting requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable


class _Line:
    """Waiting requests by client; clients take turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first is next

    async def wait(self, client: str, unused: Callable[[], object]) -> None:
        """Wait for a turn. unused: called if the turn came but the request was cancelled."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                unused()
            raise

    def call(self) -> bool:
        """Give the next client's first request its turn; False if none is waiting."""
        while self._queues:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # at the back
            if not turn.done():
                turn.set_result(None)
                return True
        return False


class FairLock:
    """A lock for work that occupies the event loop for long."""

    def __init__(self) -> None:
        self._held = False
        self._line = _Line()

    async def acquire(self, client: str) -> None:
        """Wait for the lock."""
        if self._held:
            await self._line.wait(client, self.release)
        self._held = True

    def release(self) -> None:
        """Hand the lock to the next request."""
        self._held = self._line.call()


class Gate:
    """Lets a few requests begin per iteration of the event loop.

    Hundreds of requests in a burst would otherwise all begin in one iteration; this way they delay the next
    client's request by a few of them.
    """

    def __init__(self, per_turn: int = 2) -> None:
        self._most = self._left = per_turn
        self._line = _Line()

    async def enter(self, client: str) -> None:
        """Wait until a request may begin."""
        if self._left == self._most:
            asyncio.get_running_loop().call_soon(self._refill)
        if self._left:
            self._left -= 1
        else:
            await self._line.wait(client, lambda: None)

    def _refill(self) -> None:
        self._left = self._most
        while self._left and self._line.call():
            self._left -= 1
        if self._left < self._most:
            asyncio.get_running_loop().call_soon(self._refill)
