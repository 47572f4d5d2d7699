"""Maps token prefixes to cache blocks, so that a cached prefix is not computed again.

A block is identified by the hash of its tokens chained with the hash of the block before it, so equal hashes
mean equal prefixes from the first token on. The chain starts from the request's cache salt: requests with
different salts never share a block, and cannot probe each other's prompts by timing.

The last block of a finished sequence is rarely full. It is kept as a tail, identified by the hash of the
blocks before it and its own tokens. The next turn of a conversation reuses and continues the block.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from farthing.engine.block_pool import IntegrityError

_HASH_BYTES = 16  # a collision would reuse another prefix's cache; its probability at 2^40 blocks is 2^-49


class PrefixCache:
    """Maps hashes to blocks and back. An entry is dropped when the pool reallocates its block."""

    def __init__(self, block_size: int, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._tails: dict[bytes, tuple[int, tuple[int, ...]]] = {}  # by the hash before: block and tokens
        self._tail_of: dict[int, bytes] = {}
        self._reused: Counter[int] = Counter()  # reallocations per block

    def __len__(self) -> int:
        return len(self._block_of)

    def extend(self, hashes: list[bytes], tokens: Sequence[int], salt: str, count: int) -> None:
        """Append hashes until there are `count`, one for each full block of `tokens`."""
        size = self.block_size
        for i in range(len(hashes), count):
            parent = self._parent(hashes, salt)
            data = array("q", tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(blake2b(parent + data, digest_size=_HASH_BYTES).digest())

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, digest: bytes, block: int) -> None:
        """Register a fully computed block. A second copy of known tokens is not registered."""
        if self.enabled and digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def keep_tail(self, hashes: Sequence[bytes], salt: str, tokens: Sequence[int], block: int) -> None:
        """A block that nothing uses any more begins with `tokens`, which follow the blocks of `hashes`.

        Of the tails after the same blocks only the latest is kept.
        """
        if not self.enabled or not tokens:
            return
        parent = self._parent(hashes, salt)
        old, _ = self._tails.pop(parent, (None, ()))
        if old is not None:
            del self._tail_of[old]
        self._tails[parent] = (block, tuple(tokens))
        self._tail_of[block] = parent

    def take_tail(self, hashes: Sequence[bytes], salt: str, tokens: Sequence[int]) -> tuple[int, int] | None:
        """A block that begins with `tokens`, or all of whose tokens they begin with, and how many match.

        The caller overwrites the rest of the block, so it is no longer known.
        """
        parent = self._parent(hashes, salt)
        block, held = self._tails.get(parent, (0, ()))
        count = min(len(held), len(tokens))
        if not count or held[:count] != tuple(tokens[:count]):
            return None
        del self._tails[parent], self._tail_of[block]
        return block, count

    def locate(self, digest: bytes) -> tuple[int, int] | None:
        """The block of a hash and its number of reallocations; may be called from any thread.

        Contents copied between two equal answers are those of the hash.
        """
        block = self._block_of.get(digest)
        if block is None:
            return None
        reused = self._reused[block]
        return (block, reused) if self._hash_of.get(block) == digest else None

    def contains_block(self, block: int) -> bool:
        """Whether the block can still be found."""
        return block in self._hash_of or block in self._tail_of

    def forget(self, block: int) -> None:
        """Drop a block that is about to be overwritten."""
        self._reused[block] += 1
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        parent = self._tail_of.pop(block, None)
        if parent is not None:
            del self._tails[parent]

    def check(self) -> Iterable[int]:
        """Raise IntegrityError unless hashes and blocks are one to one. Returns blocks without users."""
        if {block: digest for digest, block in self._block_of.items()} != self._hash_of:
            raise IntegrityError("prefix cache: hashes and blocks are not one to one")
        if {block: parent for parent, (block, _) in self._tails.items()} != self._tail_of:
            raise IntegrityError("prefix cache: tails and blocks are not one to one")
        return self._tail_of.keys()

    def _parent(self, hashes: Sequence[bytes], salt: str) -> bytes:
        return hashes[-1] if hashes else blake2b(salt.encode(), digest_size=_HASH_BYTES).digest()
