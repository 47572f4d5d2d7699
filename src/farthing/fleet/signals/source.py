"""The interface of a source of signals."""

from __future__ import annotations

from typing import Protocol

from farthing.fleet.snapshot import Snapshot


class Source(Protocol):
    """Reads the signals of a fleet."""

    async def read(self, current: int) -> Snapshot:
        """The signals of now; `current` is the number of replicas requested.

        A source that cannot be reached answers with a snapshot marked stale, it does not raise.
        """
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...
