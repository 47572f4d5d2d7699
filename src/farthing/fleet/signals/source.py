"""The interface of a source of signals."""

from __future__ import annotations

from typing import Protocol

from farthing.fleet.snapshot import Snapshot


class Source(Protocol):
    """Reads the signals of a fleet."""

    async def read(self, current: int) -> Snapshot:
        """The current signals; `current` is the number of requested replicas.

        An unreachable source returns a snapshot marked stale instead of raising.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...
