"""Limits the time that one client's grammars may take on the engine's thread, which computes all masks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FREE_SECONDS = 0.0003  # per mask; ordinary masks take less, even with 128,000 tokens
OWN_SECONDS = 0.002  # beyond that; a grammar that used less is not rejected
_CREDIT_SECONDS = 0.1
_REFILL = 0.05  # seconds of credit per second


class MaskTime:
    """One client's credit. One mask may overdraw it; `examine` and the limits bound that mask's time."""

    __slots__ = ("_clock", "_credit", "_refilled_at")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._credit = _CREDIT_SECONDS
        self._refilled_at = clock()

    @property
    def spent(self) -> bool:
        """Whether the credit is used up."""
        self._refill()
        return self._credit <= 0

    @property
    def full(self) -> bool:
        """Whether the credit is complete again."""
        self._refill()
        return self._credit >= _CREDIT_SECONDS

    def charge(self, seconds: float) -> None:
        """Deduct time for masks."""
        self._credit -= seconds

    def _refill(self) -> None:
        now = self._clock()
        self._credit = min(_CREDIT_SECONDS, self._credit + (now - self._refilled_at) * _REFILL)
        self._refilled_at = now


class MaskTimes:
    """Credits by client. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._credits: dict[str, MaskTime] = {}

    def of(self, client: str) -> MaskTime:
        """The client's credit."""
        with self._lock:
            if client not in self._credits:
                self._credits = {name: credit for name, credit in self._credits.items() if not credit.full}
                self._credits[client] = MaskTime()
            return self._credits[client]
