"""Reads prefixes from disk into cache blocks before their sequences are admitted.

A sequence whose prefix is being read waits outside its client's queue, so that those behind it can proceed.
Filled blocks are registered in the prefix cache, and the sequence returns to its queue and is admitted as
usual. Sequences with the same prefix share one read. Plain Python, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from farthing.engine.sequence import BlockPool, PrefixCache, S


@dataclass(frozen=True, slots=True, eq=False)
class Load(Generic[S]):
    """Blocks that are being read."""

    hashes: list[bytes]
    blocks: list[int]  # one per hash; not used by anything else
    before: list[int]  # blocks of the prefix before them, referenced so that none is reallocated
    waiters: list[S]


class BlockStore(Protocol):
    """Stores copies of blocks. No call waits for the disk."""

    def attach(self, prefix: PrefixCache) -> None:
        """Set the table used to find blocks in memory."""

    def find(self, hashes: Seq[bytes]) -> int:
        """Number of leading blocks that are stored."""

    def read(self, load: Load[Any]) -> None:
        """Fill the blocks; the engine calls `Scheduler.loaded` between two steps afterwards."""

    def computed(self, parent: bytes, hashes: list[bytes]) -> None:
        """Called with new blocks of the prefix cache and the hash before them."""

    def used(self, hashes: list[bytes]) -> None:
        """Called when a sequence with these leading blocks has ended."""


class Prefetch(Generic[S]):
    """Reads in progress and the sequences waiting for them. store: None without a disk cache."""

    def __init__(self, store: BlockStore | None, prefix: PrefixCache, pool: BlockPool) -> None:
        if store is not None:
            store.attach(prefix)
        self.store = store
        self._prefix, self._pool = prefix, pool
        self._loads: list[Load[S]] = []
        self._load_of: dict[bytes, Load[S]] = {}

    @property
    def held(self) -> Iterator[list[int]]:
        """Block references held by reads."""
        return (load.before + load.blocks for load in self._loads)

    @property
    def waiters(self) -> Iterator[S]:
        """Sequences waiting for a read."""
        return (seq for load in self._loads for seq in load.waiters)

    def wait(
        self, seq: S, hits: list[int], wanted: list[bytes], least: int, fits: Callable[[], bool]
    ) -> bool:
        """Make a sequence wait for the `wanted` blocks after its `hits`. Returns False if it need not wait.

        Starts a read of at least `least` blocks if the cache has room. Each position of a prompt is tried
        once, so that eviction cannot make a sequence read forever.
        """
        load = self._load_of.get(wanted[0]) if wanted else None
        if load is not None:
            load.waiters.append(seq)
            return True
        if self.store is None or len(hits) <= seq.read_from:
            return False
        count = self.store.find(wanted)
        count = next((i for i in range(count) if wanted[i] in self._load_of), count)
        if count < least or not fits():
            return False
        seq.read_from = len(hits)
        self._pool.share(hits)
        load = Load(wanted[:count], self._pool.allocate(count), hits, [seq])
        self._loads.append(load)
        self._load_of |= dict.fromkeys(load.hashes, load)
        self.store.read(load)
        return True

    def leave(self, seq: S) -> bool:
        """Remove a cancelled sequence. Returns False if it was not waiting."""
        for load in self._loads:
            if seq in load.waiters:
                load.waiters.remove(seq)
                return True
        return False

    def finish(self, load: Load[S], good: int) -> list[S]:
        """Register the `good` leading blocks. Returns the sequences that waited for them."""
        self._loads.remove(load)
        for digest in load.hashes:
            del self._load_of[digest]
        for digest, block in zip(load.hashes[:good], load.blocks, strict=False):
            self._prefix.register(digest, block)
        self._pool.release(reversed(load.before + load.blocks))
        return load.waiters

    def computed(self, hashes: list[bytes], first: int, end: int) -> None:
        """Called when blocks `first` to `end` of a sequence are registered."""
        if self.store is not None:
            self.store.computed(hashes[first - 1] if first else b"", hashes[first:end])

    def used(self, hashes: list[bytes]) -> None:
        """Called when a sequence with these leading blocks has ended."""
        if self.store is not None and hashes:
            self.store.used(hashes)
