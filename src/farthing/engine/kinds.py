"""What sequences hold besides the blocks that keep every token: blocks of windows, and slots of states.

A window's blocks are given back as it moves on, so a sequence holds few, and the pool has enough of them for
every row: allocating one never fails. A recurrent state takes one slot per sequence and is updated in place.

Neither can continue from an arbitrary prefix, as full attention can. At *checkpoints* the prefix cache keeps
what they hold, under the hashes of the full blocks: the window's last blocks, and a copy of the state.
Checkpoints are multiples of `every` tokens, the last edge of a block in a prompt, and the end of a sequence,
whose blocks and slot become part of its tail. A prefix hit continues after the longest prefix for which every
kind has what it needs.

A draft that is rejected has already changed the state. A step with drafts therefore continues the state in
another slot; after a rejection the sequence returns to the slot before, and the accepted tokens are computed
again, together with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq

from farthing.engine.sequence import BlockPool, Held, IntegrityError, Known, PrefixCache, Sequence
from farthing.model.kinds import window_blocks

_SPLIT = 8  # a prompt's last edge is worth a step of its own from a distance of this share


class Kind:
    """A pool, and what the prefix cache finds in it."""

    def __init__(self, prefix: PrefixCache, blocks: Seq[int], need: int) -> None:
        """need: the most blocks that running sequences hold."""
        self.known = prefix.sibling()
        self.pool = BlockPool(len(blocks), self.known.forget, self.known.contains_block, blocks)
        self.spare = len(blocks) - need


class Window(Kind):
    """Blocks of the layers with a window."""

    def __init__(self, prefix: PrefixCache, window: int, blocks: Seq[int], need: int) -> None:
        if len(blocks) < need:
            raise ValueError(f"a window of {window}: got {len(blocks)} blocks; expected {need}")
        super().__init__(prefix, blocks, need)
        self.window = window  # tokens that a token sees, itself included

    def first(self, position: int, block_size: int) -> int:
        """The first block that a token at `position` and those after it see."""
        return max(0, position - self.window + 1) // block_size


class Kinds:
    """All kinds but the one that keeps every token; of none, everything is usable and nothing is kept."""

    def __init__(
        self,
        prefix: PrefixCache,
        windows: Mapping[int, Seq[int]],
        slots: Seq[int],
        step: tuple[int, int, int],
        every: int,
    ) -> None:
        """windows: blocks by size; slots: of states, () if the model has none. step: the last arguments of
        `window_blocks`."""
        self._prefix, self._size = prefix, prefix.block_size
        self.every = -(-every // self._size) * self._size
        self._split = self.every // _SPLIT
        self.windows = [
            Window(prefix, window, blocks, window_blocks(window, self._size, *step))
            for window, blocks in windows.items()
        ]
        if slots and len(slots) < step[0]:
            raise ValueError(f"states: got {len(slots)} slots; expected max_num_seqs = {step[0]}")
        self.states = Kind(prefix, slots, step[0]) if slots else None
        self.whole_tails = self.states is not None  # whether a tail must be continued at its end
        # Kinds 1, 2, …: windows, then states.
        self.all: list[Kind] = [*self.windows, *([] if self.states is None else [self.states])]
        self.copies: dict[int, int] = {}  # of states, to make before the next step: source by target
        self._copied: list[bytes] = []  # hashes of checkpoints among them

    @property
    def forms(self) -> tuple[dict[int, list[int]], list[int], int]:
        """Windows, slots and distance of checkpoints, as it was made."""
        windows = {window.window: window.pool.blocks for window in self.windows}
        return windows, [] if self.states is None else self.states.pool.blocks, self.every

    # -- admission

    def usable(self, seq: Sequence, hits: int, tails: bool = True) -> int:
        """The most of `hits` leading blocks after which `seq` can continue, in a tail if `tails`."""
        if not self.all:
            return hits
        for count in range(hits, 0, -1):
            first = count * self._size
            rest = seq.tokens[first:-1][: self._size] if tails and seq.read_cache else []
            tail = self._prefix.tail(seq.hashes[:count], seq.salt, rest, self.whole_tails)
            if all(digest in kind.known for kind, digest in self._needed(seq, count, tail)):
                return count
        return 0

    def _needed(self, seq: Sequence, count: int, tail: int = 0) -> Iterator[tuple[Kind, bytes]]:
        """What `seq` needs to continue after `count` blocks, and `tail` tokens of a tail."""
        if not count:
            return
        if self.states is not None and not tail:
            yield self.states, seq.hashes[count - 1]
        for window in self.windows:
            first = window.first(count * self._size + tail, self._size)
            yield from ((window, seq.hashes[j]) for j in range(count - 1, first - 1, -1))

    def missing(
        self, seq: Sequence, count: int, stored: Callable[[int, bytes], bool]
    ) -> list[tuple[int, bytes]] | None:
        """(kind, hash) of what is to be read to continue after `count` blocks; None if that is not possible.

        stored: whether a kind's block is on disk.
        """
        needed = [(k, digest) for k, digest in self._needed(seq, count) if digest not in k.known]
        wanted = [(self.all.index(k) + 1, digest) for k, digest in needed]
        return wanted if all(stored(*each) for each in wanted) else None

    def present(self, seq: Sequence, count: int) -> list[tuple[int, bytes, int]]:
        """(kind, hash, block) of what is in memory to continue after `count` blocks."""
        needed = [(k, digest) for k, digest in self._needed(seq, count) if digest in k.known]
        return [(self.all.index(k) + 1, digest, k.known[digest]) for k, digest in needed]

    def fits(self) -> bool:
        """Whether another sequence can get a slot."""
        return self.states is None or self.states.pool.num_free > 0

    def admit(self, seq: Sequence, count: int, cached: int, tail: Seq[int]) -> None:
        """`seq` continues after `cached` tokens: `count` blocks, and those of a tail if there is one."""
        parts = list(tail)
        seq.held = []
        for w in self.windows:
            first = min(count, w.first(cached, self._size))
            own = [w.known[digest] for digest in seq.hashes[first:count]]
            own += [parts.pop(0)] if parts else []
            w.pool.share(own)
            seq.held.append(Held([0] * first + own, first))
        if self.states is not None:
            seq.slot = self._state(self.states, seq.hashes[count - 1] if count else None, parts)
        edge = (len(seq.tokens) - 1) // self._size * self._size
        before = max(cached, edge // self.every * self.every)
        seq.checkpoint = edge if self.states is None or edge - before >= self._split else 0

    def _state(self, states: Kind, digest: bytes | None, tail: Seq[int]) -> int:
        """A slot with the state at a checkpoint or at the end of a tail; any slot before the first token."""
        if tail:
            states.pool.share(tail)
            return tail[0]
        if digest is None:
            return states.pool.allocate(1)[0]
        kept = states.known[digest]
        states.pool.share([kept])
        if not states.pool.num_free:  # no other slot is left: take this one over
            states.known.forget(kept)
            return kept
        (own,) = states.pool.allocate(1)
        self.copies[own] = kept
        states.pool.release([kept])
        return own

    # -- steps

    def until(self, seq: Sequence) -> int | None:
        """Number of tokens up to the next checkpoint, where a step must end to keep the state; None if it
        need not."""
        if self.states is None or not self._prefix.enabled:
            return None
        start = seq.num_computed
        regular = self.every - start % self.every
        return min(regular, seq.checkpoint - start) if seq.checkpoint > start else regular

    def grow(self, seq: Sequence, length: int) -> None:
        """Hold blocks for the tokens of a step, up to `length` in all."""
        for w, held in zip(self.windows, seq.held, strict=True):
            need = -(-length // self._size) - len(held.blocks)
            if need > 0:
                held.blocks += w.pool.allocate(need)

    def guard(self, seq: Sequence) -> bool:
        """Keep the state before drafts, which are computed in another slot. False if there is none, so that
        there can be no drafts."""
        if self.states is None:
            return True
        if not self.states.pool.num_free:
            return False
        seq.backup, (seq.slot,) = seq.slot, self.states.pool.allocate(1)
        return True

    def _copy(self, states: Kind, source: int) -> int:
        """A new slot into which a state will be copied before the next step."""
        (target,) = states.pool.allocate(1)
        self.copies[target] = source
        return target

    def settle_drafts(self, seq: Sequence, accepted: bool) -> bool:
        """Drafts after `guard` were computed. False if the state is again that before them."""
        assert self.states is not None
        wrong, seq.backup = seq.backup, -1
        if not accepted:
            wrong, seq.slot = seq.slot, wrong
        self.states.pool.release([wrong])
        return accepted

    def commit(self, seq: Sequence, before: int) -> list[tuple[int, int, int]]:
        """Tokens from `before` on were computed: keep what is due, and give back what is forgotten.

        Returns the blocks that were kept: (kind, first, end).
        """
        kept = [each for edge in self._edges(seq, before) for each in self._keep(seq, edge)]
        last = seq.num_computed // self._size * self._size
        longest = -(-len(seq.tokens) // self._size)
        for window, held in zip(self.windows, seq.held, strict=True):
            first = window.first(last, self._size)
            if first > held.forgotten:
                window.pool.release(reversed(held.blocks[held.forgotten : first]))
                held.blocks[held.forgotten : first] = [0] * (first - held.forgotten)
                held.forgotten = first
            if len(held.blocks) > longest:  # of rejected drafts
                window.pool.release(reversed(held.blocks[longest:]))
                del held.blocks[longest:]
                held.filled = min(held.filled, longest)
        return kept

    def _edges(self, seq: Sequence, before: int) -> list[int]:
        """Checkpoints after `before` tokens and up to those that are computed."""
        if not self._prefix.enabled:
            return []
        edges = list(range((before // self.every + 1) * self.every, seq.num_computed + 1, self.every))
        if before < seq.checkpoint <= seq.num_computed and seq.checkpoint % self.every:
            edges.append(seq.checkpoint)
        return sorted(edges)

    def _keep(self, seq: Sequence, edge: int) -> list[tuple[int, int, int]]:
        """Leave in the prefix cache what is needed to continue after `edge` tokens."""
        kept = self._keep_windows(seq, edge)
        states, digest = self.states, seq.hashes[edge // self._size - 1]
        if states is None or edge != seq.num_computed or digest in states.known or not states.pool.num_free:
            return kept
        slot = self._copy(states, seq.slot)
        states.known.register(digest, slot)
        states.pool.release([slot])
        self._copied.append(digest)
        return kept

    def _keep_windows(self, seq: Sequence, edge: int) -> list[tuple[int, int, int]]:
        kept, count = [], edge // self._size
        for number, (window, held) in enumerate(zip(self.windows, seq.held, strict=True), 1):
            first = max(held.forgotten, window.first(edge, self._size))
            for j in range(first, count):
                window.known.register(seq.hashes[j], held.blocks[j])
            kept.append((number, first, count))
        return kept

    def take_copies(self) -> tuple[list[tuple[int, int]], list[bytes]]:
        """(source, target) of the states to copy now, and the checkpoints that are then complete."""
        copies, copied = [(source, target) for target, source in self.copies.items()], self._copied
        self.copies, self._copied = {}, []
        return copies, copied

    # -- the end

    def leave(self, seq: Sequence, whole: bool) -> tuple[list[tuple[int, int, int]], list[tuple[Known, int]]]:
        """Leave in the prefix cache what is needed to continue the tokens of `seq`.

        whole: False if the state is that of a step that was given up half-way. Returns the blocks that were
        kept, as `commit` does, and the parts of a tail after its first.
        """
        done, states = seq.num_computed, self.states
        count = done // self._size
        if not self._prefix.enabled or not done or (states is not None and not whole):
            return [], []
        kept = self._keep_windows(seq, count * self._size) if count else []
        if done % self._size:
            parts = [(w.known, held.blocks[count]) for w, held in zip(self.windows, seq.held, strict=True)]
            return kept, parts + ([] if states is None else [(states.known, seq.slot)])
        if states is not None and seq.hashes[count - 1] not in states.known:
            states.known.register(seq.hashes[count - 1], seq.slot)
            kept.append((len(self.all), count - 1, count))
        return kept, []

    def release(self, seq: Sequence) -> None:
        """Drop the references to everything that `seq` holds."""
        for window, held in zip(self.windows, seq.held, strict=True):
            window.pool.release(reversed(held.live))
        seq.held, seq.redo = [], 0
        if self.states is not None:
            self.states.pool.release(_slots(seq))
            seq.slot = seq.backup = -1

    def check(self, sequences: Iterable[Sequence], reads: Iterable[tuple[int, int]]) -> None:
        """Raise IntegrityError if blocks or slots leaked. reads: (kind, block) that reads hold."""
        held, read = list(sequences), list(reads)
        for number, kind in enumerate(self.all, 1):
            window = number <= len(self.windows)
            owners = [seq.held[number - 1].live if window else _slots(seq) for seq in held]
            kind.pool.check([*owners, [block for n, block in read if n == number]])
            if any(kind.pool.refs(block) for block in kind.known.check()):
                raise IntegrityError("the tail of a sequence that ended is in use")


def _slots(seq: Sequence) -> list[int]:
    return [slot for slot in (seq.slot, seq.backup) if slot >= 0]
