"""Reads prefixes from disk into cache blocks before their sequences are admitted.

A sequence whose prefix is being read waits outside its client's queue, so that those behind it can proceed.
Filled blocks are registered in the prefix cache, and the sequence returns to its queue and is admitted as
usual. Sequences with the same prefix share one read. Plain Python, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from farthing.engine.kinds import Kinds
from farthing.engine.sequence import BlockPool, Known, S


@dataclass(frozen=True, slots=True, eq=False)
class Load(Generic[S]):
    """Blocks that are being read."""

    hashes: list[bytes]
    blocks: list[int]  # one per hash; not used by anything else
    before: list[int]  # blocks of the prefix that are in memory, referenced so that none is reallocated
    waiters: list[S]
    kinds: tuple[int, ...] = ()  # of the hashes, in order; (): all keep every token
    present: tuple[tuple[int, int], ...] = ()  # (kind, block) of other kinds, referenced like `before`
    span: tuple[bytes, ...] = ()  # the part of the prefix that is in memory when the read has ended

    @property
    def entries(self) -> list[tuple[int, bytes, int]]:
        """Kind, hash and block of each."""
        kinds = self.kinds or [0] * len(self.hashes)
        return list(zip(kinds, self.hashes, self.blocks, strict=True))

    @property
    def held(self) -> list[tuple[int, int]]:
        """(kind, block) of all references."""
        read = [(kind, block) for kind, _, block in self.entries]
        return [*((0, block) for block in self.before), *self.present, *read]


class BlockStore(Protocol):
    """Stores copies of blocks. No call waits for the disk. kind: 0 for the blocks that keep every token."""

    def attach(self, known: Seq[Known]) -> None:
        """Set the tables used to find blocks in memory, by kind."""

    def find(self, hashes: Seq[bytes], kind: int = 0) -> int:
        """Number of leading blocks that are stored."""

    def read(self, load: Load[Any]) -> None:
        """Fill the blocks; the engine calls `Scheduler.loaded` between two steps afterwards."""

    def computed(self, parent: bytes, hashes: list[bytes], kind: int = 0) -> None:
        """Called with new blocks of the prefix cache and the hash before them."""

    def used(self, hashes: list[bytes]) -> None:
        """Called when a sequence with these leading blocks has ended."""


class Prefetch(Generic[S]):
    """Reads in progress and the sequences waiting for them. store: None without a disk cache."""

    def __init__(
        self,
        store: BlockStore | None,
        pools: Seq[BlockPool],
        known: Seq[Known],
        kinds: Kinds,
    ) -> None:
        """pools, known: of every kind."""
        self._pools, self._known, self._spare = pools, known, [kind.spare for kind in kinds.all]
        if store is not None:
            store.attach(self._known)
        self.store, self._kinds = store, kinds
        self._loads: list[Load[S]] = []
        self._load_of: dict[bytes, Load[S]] = {}

    @property
    def held(self) -> Iterator[list[int]]:
        """References to blocks that keep every token."""
        return ([block for kind, block in load.held if not kind] for load in self._loads)

    @property
    def others(self) -> Iterator[tuple[int, int]]:
        """References to blocks of other kinds: (kind, block)."""
        return ((kind, block) for load in self._loads for kind, block in load.held if kind)

    @property
    def reading(self) -> bool:
        """Whether blocks are being read."""
        return bool(self._loads)

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
        count = self._available(seq, len(hits), wanted)
        if count < least or not fits():
            return False
        load = self._plan(seq, hits, wanted[:count])
        if not load.hashes or not self._has_room(load):
            return False
        seq.read_from = len(hits)
        for kind, block in [*((0, block) for block in load.before), *load.present]:
            self._pools[kind].share([block])
        load.blocks.extend(self._pools[kind].allocate(1)[0] for kind in load.kinds)
        self.store.read(load)
        self._add(load)
        return True

    def take_over(self, other: Prefetch[S]) -> None:
        """Reads that another one has begun still fill their blocks; nothing waits for them any more."""
        for load in other._loads:
            load.waiters.clear()
            for kind, block in load.held:
                self._pools[kind].share([block])
            self._add(load)

    def _add(self, load: Load[S]) -> None:
        self._loads.append(load)
        self._load_of |= dict.fromkeys(load.span, load)

    def _available(self, seq: S, hits: int, wanted: list[bytes]) -> int:
        """Number of `wanted` blocks that are in memory or on disk, as is what other kinds need after them."""
        found = 0
        for digest in wanted:
            if digest in self._load_of or not (digest in self._known[0] or self._stored(0, digest)):
                break
            found += 1
        if not self._kinds:
            return found
        each = range(found, 0, -1)
        return next((n for n in each if self._kinds.missing(seq, hits + n, self._stored) is not None), 0)

    def _stored(self, kind: int, digest: bytes) -> bool:
        assert self.store is not None
        return self.store.find([digest], kind) == 1

    def _plan(self, seq: S, hits: list[int], wanted: list[bytes]) -> Load[S]:
        """What to read, into blocks that are not allocated yet, and what is in memory."""
        known, count = self._known[0], len(hits) + len(wanted)
        new = [(0, digest) for digest in wanted if digest not in known]
        before = hits + [known[digest] for digest in wanted if digest in known]
        present: list[tuple[int, int]] = []
        if self._kinds:
            new += self._kinds.missing(seq, count, self._stored) or []
            present = [(kind, block) for kind, _, block in self._kinds.present(seq, count)]
        kinds, hashes = tuple(kind for kind, _ in new), [digest for _, digest in new]
        return Load(hashes, [], before, [seq], kinds, tuple(present), tuple(wanted))

    def _has_room(self, load: Load[S]) -> bool:
        """Whether running sequences can spare what a read will hold."""
        wanted = Counter(load.kinds)
        held = Counter(kind for kind, _ in self.others) + Counter(kind for kind, _ in load.present) + wanted
        return all(held[kind] <= spare for kind, spare in enumerate(self._spare, 1)) and all(
            count <= self._pools[kind].num_free for kind, count in wanted.items()
        )

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
        for digest in load.span:
            del self._load_of[digest]
        for kind, digest, block in load.entries[:good]:
            self._known[kind].register(digest, block)
        for kind, block in reversed(load.held):
            self._pools[kind].release([block])
        return load.waiters

    def kept(self, hashes: list[bytes], blocks: Seq[tuple[int, int, int]]) -> None:
        """Called with blocks of other kinds that are registered: (kind, first, end) of a sequence."""
        if self.store is not None:
            for kind, first, end in blocks:
                self.store.computed(hashes[first - 1] if first else b"", hashes[first:end], kind)

    def copied(self, hashes: list[bytes]) -> None:
        """Called with checkpoints whose states were copied."""
        if self.store is not None:
            for digest in hashes:
                self.store.computed(b"", [digest], len(self._known) - 1)

    def computed(self, hashes: list[bytes], first: int, end: int) -> None:
        """Called when blocks `first` to `end` of a sequence are registered."""
        if self.store is not None:
            self.store.computed(hashes[first - 1] if first else b"", hashes[first:end])

    def used(self, hashes: list[bytes]) -> None:
        """Called when a sequence with these leading blocks has ended."""
        if self.store is not None and hashes:
            self.store.used(hashes)
