"""Reference-counted cache blocks. They are plain integers; the runner owns the memory.

A block without references keeps its contents until it is reallocated, least recently used first; the prefix
cache relies on this. Blocks without reusable contents are reallocated before those.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class IntegrityError(AssertionError):
    """An engine invariant is violated: a bug of ours, never caused by a request."""


class BlockPool:
    """`num_blocks` blocks, each free or referenced at least once.

    on_reuse(block) is called before a free block is reallocated; is_cached(block) tells whether a block
    that becomes free is worth keeping. blocks: which ones of the memory are this pool's; None: the first.
    """

    def __init__(
        self,
        num_blocks: int,
        on_reuse: Callable[[int], None] = lambda block: None,
        is_cached: Callable[[int], bool] = lambda block: False,
        blocks: Sequence[int] | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: got {num_blocks}; expected at least 1")
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._is_cached = is_cached
        self._refs = dict.fromkeys(range(num_blocks) if blocks is None else blocks, 0)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(self._refs)  # least recently used first

    @property
    def blocks(self) -> list[int]:
        """The pool's blocks."""
        return list(self._refs)

    @property
    def num_free(self) -> int:
        """Blocks without references."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Referenced share of the pool, 0…1."""
        return 1.0 - len(self._free) / self.num_blocks

    def refs(self, block: int) -> int:
        """References to a block."""
        return self._refs[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has checked `num_free`."""
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked of {len(self._free)} free ones")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._on_reuse(block)
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, whether free (but still filled) or in use."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block. Pass them last to first: a sequence's tail is reused first."""
        for block in blocks:
            if self._refs[block] < 1:
                raise IntegrityError(f"block {block} released more often than referenced")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if not self._is_cached(block):
                    self._free.move_to_end(block, last=False)

    def exchange(self, out: int, into: int) -> None:
        """Swap a block for one of another process's pool, which takes over its references."""
        self._refs[into] = self._refs.pop(out)
        if out in self._free:
            del self._free[out]
            self._on_reuse(out)
            self._free[into] = None
            self._free.move_to_end(into, last=False)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Raise IntegrityError unless the references are exactly those of `owners` (lists of blocks)."""
        expected = Counter(block for blocks in owners for block in blocks)
        if len(self._refs) != self.num_blocks or not expected.keys() <= self._refs.keys():
            raise IntegrityError(
                f"the pool has {len(self._refs)} blocks of {self.num_blocks}; its owners hold others: "
                f"{sorted(expected.keys() - self._refs.keys())}"
            )
        for block, have in self._refs.items():
            want = expected[block]
            if have != want:
                raise IntegrityError(f"block {block} has {have} references; its owners hold {want}")
            if (have == 0) != (block in self._free):
                raise IntegrityError(
                    f"block {block} has {have} references and is free: {block in self._free}"
                )
