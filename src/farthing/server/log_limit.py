"""Limits repeated log lines, so that a client can neither fill the log nor occupy the event loop with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

PERIOD = 10.0  # seconds
MOST = 5  # records of one message in a period
_MESSAGES = 64  # messages counted at a time; beyond that, counting starts over


class LogLimit(logging.Filter):
    """Passes at most MOST records per message and period; the first record of the next period states how many
    were dropped. A request cancelled at shutdown is not an error and is dropped silently."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._began = clock()
        self._held_back: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record."""
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False
        message = str(record.msg)
        if self._clock() - self._began >= PERIOD or len(self._counts) > _MESSAGES:
            self._held_back = {m: n - MOST for m, n in self._counts.items() if n > MOST}
            self._counts, self._began = {}, self._clock()
        count = self._counts[message] = self._counts.get(message, 0) + 1
        if held_back := self._held_back.pop(message, 0):
            record.msg = f"{message} ({held_back} more were not logged)"
        return count <= MOST
