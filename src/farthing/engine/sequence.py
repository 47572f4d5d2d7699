"""Sequences as the scheduler sees them, the cache blocks that they hold, and the prefixes that they share."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from operator import attrgetter
from typing import Generic, NamedTuple, Protocol, TypeVar


class IntegrityError(AssertionError):
    """An engine invariant is violated: a bug of ours, never caused by a request."""


class BlockPool:
    """`num_blocks` blocks, each free or referenced at least once.

    on_reuse(block) is called before a free block is reallocated; is_cached(block) tells whether a block
    that becomes free is worth keeping. blocks: which ones of the memory are this pool's; None: the first.

    A block without references keeps its contents until it is reallocated, least recently used first; the
    prefix cache relies on this. Blocks without reusable contents are reallocated before those.
    """

    def __init__(
        self,
        num_blocks: int,
        on_reuse: Callable[[int], None] = lambda block: None,
        is_cached: Callable[[int], bool] = lambda block: False,
        blocks: Seq[int] | None = None,
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
        """`count` blocks with one reference each; the caller has checked `num_free`.

        They are in ascending order, because attention reads neighbouring blocks up to 1.6 times as fast.
        """
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked of {len(self._free)} free ones")
        blocks = sorted(self._free.popitem(last=False)[0] for _ in range(count))
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


class Missed(NamedTuple):
    """Why tokens of a prompt are computed and not read from the prefix cache."""

    new: int = 0  # never seen after what comes before them
    diverged: int = 0  # an earlier prompt continued otherwise here: an edit, a fork, another question
    evicted: int = 0  # computed before, and their blocks were given to others
    state: int = 0  # their blocks are cached, but not the state or the window to continue after them


_HASH_BYTES = 16  # a collision would reuse another prefix's cache; its probability at 2^40 blocks is 2^-49


class Listener(Protocol):
    """Is told which blocks of tokens the prefix cache holds, in the engine's thread."""

    def stored(self, digests: Seq[bytes], parent: bytes | None, tokens: Seq[int]) -> None:
        """Blocks that follow each other were computed. parent: the block before them, if any."""
        ...

    def removed(self, digest: bytes) -> None:
        """A block was evicted."""
        ...

    def cleared(self) -> None:
        """No block is left."""
        ...


class Known:
    """Maps hashes to the blocks of one kind and back. An entry is dropped when its block is reallocated."""

    def __init__(self, tails: dict[bytes, Tail] | None = None, enabled: bool = True) -> None:
        """tails: those of all kinds of a model."""
        self.enabled = enabled
        self.listener: Listener | None = None
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._tails: dict[bytes, Tail] = {} if tails is None else tails  # by the hash before
        self._tail_of: dict[int, bytes] = {}
        self._reused: Counter[int] = Counter()  # reallocations per block

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._block_of

    def __getitem__(self, digest: bytes) -> int:
        return self._block_of[digest]

    def match(self, hashes: Seq[bytes]) -> list[int]:
        """Blocks of the longest known prefix."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, digest: bytes, block: int) -> bool:
        """Register a fully computed block, unless it is a second copy of known tokens; whether it was."""
        if not self.enabled or digest in self._block_of:
            return False
        self._block_of[digest] = block
        self._hash_of[block] = digest
        return True

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
        """Drop a block that is about to be overwritten, or whose contents may be wrong."""
        self._reused[block] += 1
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
            if self.listener is not None:
                self.listener.removed(digest)
        parent = self._tail_of.get(block)
        if parent is not None:
            self._drop_tail(parent)

    def check(self) -> Iterable[int]:
        """Raise IntegrityError unless hashes and blocks are one to one. Returns blocks without users."""
        if {block: digest for digest, block in self._block_of.items()} != self._hash_of:
            raise IntegrityError("prefix cache: hashes and blocks are not one to one")
        held = {
            block: parent
            for parent, tail in self._tails.items()
            for known, block in tail.parts
            if known is self
        }
        if held != self._tail_of:
            raise IntegrityError("prefix cache: tails and blocks are not one to one")
        return self._tail_of.keys()

    def _drop_tail(self, parent: bytes) -> None:
        tail = self._tails.pop(parent, None)
        if tail is not None:
            for known, block in tail.parts:
                del known._tail_of[block]


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows a prefix of full blocks: fewer tokens than a block, and a block (or slot) of each kind."""

    tokens: tuple[int, ...]
    parts: tuple[tuple[Known, int], ...]


_PAST = 65_536  # blocks whose hash is remembered, cached or not; a million tokens in blocks of 16


class PrefixCache(Known):
    """The blocks that keep every token, and the tails of all kinds.

    A block is identified by the hash of its tokens chained with the hash of the block before it, so equal
    hashes mean equal prefixes from the first token on. The chain starts from the request's cache salt:
    requests with different salts never share a block, and cannot probe each other's prompts by timing.

    The last block of a finished sequence is rarely full. It is kept as a tail, identified by the hash of the
    blocks before it and its own tokens. The next turn of a conversation reuses and continues the block.
    """

    def __init__(self, block_size: int, enabled: bool = True) -> None:
        super().__init__(enabled=enabled)
        self.block_size = block_size
        self._past: OrderedDict[bytes, bytes | None] = OrderedDict()  # hash: of the latest block after it

    def sibling(self) -> Known:
        """Another kind's blocks, under the same hashes."""
        return Known(self._tails, self.enabled)

    def extend(self, hashes: list[bytes], tokens: Seq[int], salt: str, count: int) -> None:
        """Append hashes until there are `count`, one for each full block of `tokens`."""
        size = self.block_size
        for i in range(len(hashes), count):
            parent = self._parent(hashes, salt)
            data = array("q", tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(blake2b(parent + data, digest_size=_HASH_BYTES).digest())

    def computed(self, seq: Sequence, end: int) -> None:
        """Register the blocks of a sequence up to `end`; `missed` knows them after they are evicted, too."""
        hashes, salt, size = seq.hashes, seq.salt, self.block_size
        for i in range(seq.num_registered, end):
            digest = hashes[i]
            if self.register(digest, seq.blocks[i]) and self.listener is not None:
                before = hashes[i - 1] if i else None
                self.listener.stored((digest,), before, seq.tokens[i * size : (i + 1) * size])
            self._past[self._parent(hashes[max(0, i - 1) : i], salt)] = digest
            self._past.setdefault(digest, None)
        while len(self._past) > _PAST:
            self._past.popitem(last=False)

    def missed(self, seq: Sequence, hits: int) -> Missed:
        """Why the tokens of a prompt after the `num_cached` ones are computed. hits: its cached blocks."""
        left, size = seq.num_prompt - seq.num_cached, self.block_size
        state = min(left, max(0, hits * size - seq.num_cached))
        at = hits
        while at < len(seq.hashes) and seq.hashes[at] in self._past:
            at += 1
        evicted = min(left - state, (at - hits) * size)
        left -= state + evicted
        other, diverged = self._parent(seq.hashes[:at], seq.salt), 0
        while left > diverged and seq.num_cached <= at * size:
            following = self._past.get(other)
            if following is None:
                tail = self._tails.get(other)
                diverged += len(tail.tokens) if tail is not None else 0
                break
            other, diverged = following, diverged + size
        diverged = min(left, diverged)
        return Missed(left - diverged, diverged, evicted, state)

    def keep_tail(
        self,
        hashes: Seq[bytes],
        salt: str,
        tokens: Seq[int],
        block: int,
        others: Iterable[tuple[Known, int]] = (),
    ) -> None:
        """A block that nothing uses any more begins with `tokens`, which follow the blocks of `hashes`.

        others: the same of other kinds. Of the tails after the same blocks only the latest is kept.
        """
        if not self.enabled or not tokens:
            return
        parent = self._parent(hashes, salt)
        self._drop_tail(parent)
        tail = self._tails[parent] = Tail(tuple(tokens), ((self, block), *others))
        for known, held in tail.parts:
            known._tail_of[held] = parent

    def tail(self, hashes: Seq[bytes], salt: str, tokens: Seq[int], whole: bool = False) -> int:
        """How many `tokens` a block that follows those of `hashes` begins with; they are all, or the block
        has no others. whole: only a block that has no others."""
        tail = self._tails.get(self._parent(hashes, salt))
        if tail is None:
            return 0
        count = min(len(tail.tokens), len(tokens))
        if tail.tokens[:count] != tuple(tokens[:count]) or (whole and count < len(tail.tokens)):
            return 0
        return count

    def take_tail(
        self, hashes: Seq[bytes], salt: str, tokens: Seq[int], whole: bool = False
    ) -> tuple[list[int], int] | None:
        """The block of `tail`, then those of other kinds, and how many tokens match.

        The caller overwrites the rest of the block, so it is no longer known.
        """
        count = self.tail(hashes, salt, tokens, whole)
        if not count:
            return None
        parent = self._parent(hashes, salt)
        blocks = [block for _, block in self._tails[parent].parts]
        self._drop_tail(parent)
        return blocks, count

    def _parent(self, hashes: Seq[bytes], salt: str) -> bytes:
        return hashes[-1] if hashes else blake2b(salt.encode(), digest_size=_HASH_BYTES).digest()


@dataclass(slots=True)
class Held:
    """The blocks of a sequence in one kind: one per block of tokens, of which the first were given back."""

    blocks: list[int] = field(default_factory=list)
    forgotten: int = 0  # leading entries without a block
    filled: int = 0  # entries already copied to the runner's table

    @property
    def live(self) -> list[int]:
        """The blocks themselves."""
        return self.blocks[self.forgotten :]


class Status(Enum):
    """Scheduling state of a sequence."""

    NEW = auto()  # not added to the scheduler yet
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """State that the scheduler reads and writes. The engine's completions (`Generation`) extend it.

    tokens[:num_computed] are in the cache. While decoding, the last token is sampled and not yet computed.
    """

    id: int
    tokens: list[int]  # prompt, then output
    num_prompt: int
    max_len: int  # maximum number of tokens
    order: float = 0.0  # urgency: smaller runs first, larger is preempted first
    salt: str = ""
    read_cache: bool = True
    client: str = ""  # clients share the engine fairly
    scored: bool = False  # every token of the prompt needs logits

    status: Status = Status.NEW
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache at the last admission
    missed: Missed | None = None  # why the rest of the prompt is computed; None: the cache was not asked
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # leading blocks registered in the prefix cache
    read_from: int = -1  # the last block at which a read from disk was started
    drafts: list[int] = field(default_factory=list)  # proposed continuation, unverified
    busy: bool = False  # its scheduled tokens take several steps
    preemptions: int = 0
    held: list[Held] = field(default_factory=list)  # what each kind with a window keeps (`kinds.py`)
    slot: int = -1  # of its state, if the model has states
    backup: int = -1  # slot of the state before the drafts that are being computed
    redo: int = 0  # tokens at the end, but for the last, that the model has seen and must compute again
    checkpoint: int = 0  # the last edge of its prompt at which it is worth keeping what other kinds hold
    row: int = -1  # while running: a unique index below max_num_seqs
    row_filled: int = 0  # blocks already copied to the runner's table
    tainted: bool = False  # what it computed may be wrong: nothing of it stays in the prefix cache

    def reset(self) -> None:
        """It holds nothing of a cache any more: all of its tokens are to be computed again."""
        self.blocks, self.held, self.drafts = [], [], []
        self.num_computed = self.num_cached = self.num_registered = self.redo = 0
        self.row = self.slot = self.backup = self.read_from = -1
        self.busy = False

    @property
    def key(self) -> tuple[float, int]:
        """Total order of urgency."""
        return (self.order, self.id)

    @property
    def num_output(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Number of tokens that are not in the cache yet."""
        return len(self.tokens) - self.num_computed


S = TypeVar("S", bound=Sequence)
KEY = attrgetter("key")


@dataclass(frozen=True, slots=True)
class Scheduled(Generic[S]):
    """One sequence's part of a step: tokens[start : start + count], then `drafts`."""

    seq: S
    start: int
    count: int
    drafts: tuple[int, ...]
    sample: bool  # the last known token is included, so the step samples the next one
    decode: bool  # only the last sampled token (and drafts)
    first: bool  # admitted in this step

    @property
    def num_tokens(self) -> int:
        """Number of rows in the step."""
        return self.count + len(self.drafts)


class Queues(dict[str, list[S]]):
    """Waiting sequences by client; clients without any are absent."""

    def push(self, seq: S) -> None:
        """Insert a sequence in order."""
        insort(self.setdefault(seq.client, []), seq, key=KEY)

    def drop(self, seq: S) -> None:
        """Remove a sequence."""
        queue = self.get(seq.client, [])
        remove(queue, seq)
        if not queue:
            del self[seq.client]


def remove(sequences: list[S], seq: S) -> None:
    """Remove a sequence."""
    index = bisect_left(sequences, seq.key, key=KEY)
    if index == len(sequences) or sequences[index] is not seq:
        raise IntegrityError(f"sequence {seq.id} is missing from the queue of its status")
    del sequences[index]
