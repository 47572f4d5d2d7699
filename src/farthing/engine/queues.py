"""Queues of sequences, ordered by urgency."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from farthing.engine.block_pool import IntegrityError
from farthing.engine.sequence import S

KEY = attrgetter("key")


class Queues(dict[str, list[S]]):
    """Waiting sequences by client; clients without any are absent."""

    def push(self, seq: S) -> None:
        """Insert a sequence in order."""
        insert(self.setdefault(seq.client, []), seq)

    def drop(self, seq: S) -> None:
        """Remove a sequence."""
        queue = self.get(seq.client, [])
        remove(queue, seq)
        if not queue:
            del self[seq.client]


def insert(sequences: list[S], seq: S) -> None:
    """Insert a sequence in order."""
    insort(sequences, seq, key=KEY)


def remove(sequences: list[S], seq: S) -> None:
    """Remove a sequence."""
    index = bisect_left(sequences, seq.key, key=KEY)
    if index == len(sequences) or sequences[index] is not seq:
        raise IntegrityError(f"sequence {seq.id} is missing from the queue of its status")
    del sequences[index]
