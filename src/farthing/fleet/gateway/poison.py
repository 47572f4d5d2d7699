"""Requests that were in flight on a replica that died: which of them may be retried.

A request that was alone on the replica is assumed to be the cause and refused until its entry expires. With
several, or in the middle of an answer, each is a suspect: it may be sent to one more replica, and is refused
once a second one dies.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

Identity = tuple[str, str, bytes]  # method, path and query, body
_ENTRIES = 4096
_GUILTY = 2  # strikes


class Poison:
    """Strikes per request digest; the oldest entries are evicted first, and each expires after `ttl_s`."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl, self._clock = ttl_s, clock
        self._strikes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # (strikes, expiry)

    def __len__(self) -> int:
        return len(self._strikes)

    def strike(self, identity: Identity, *, alone: bool) -> None:
        """Record that a replica died with this request in flight."""
        key = _digest(identity)
        strikes = self._current(key) + (_GUILTY if alone else 1)
        self._strikes[key] = (strikes, self._clock() + self._ttl)
        self._strikes.move_to_end(key)
        while len(self._strikes) > _ENTRIES:
            self._strikes.popitem(last=False)

    def refuses(self, identity: Identity) -> bool:
        """Whether this request must not be sent to another replica."""
        return bool(self._strikes) and self._current(_digest(identity)) >= _GUILTY

    def _current(self, key: bytes) -> int:
        strikes, expiry = self._strikes.get(key, (0, 0.0))
        if strikes and expiry <= self._clock():
            del self._strikes[key]
            return 0
        return strikes


def _digest(identity: Identity) -> bytes:
    method, target, body = identity
    state = blake2b(f"{method} {target}\n".encode("utf-8", "surrogateescape"), digest_size=16)
    state.update(body)
    return state.digest()
