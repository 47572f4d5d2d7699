"""Which sequences compute which tokens in the next step.

Continuous batching (Yu et al. 2022) with chunked prefill (Agrawal et al. 2024) under one token budget:
every decoding sequence gets its token first, then prompts in progress, then waiting ones. While sequences
decode, `prompt_limit` further bounds the prompt tokens of a step. Blocks for a whole prompt are allocated on
admission, so only decoding can run out of blocks; then the least urgent running sequence is preempted: its
blocks are freed and it recomputes its tokens later.

A waiting prompt whose next blocks are being computed by a running one waits for them, so prompts that arrive
together compute a shared prefix once.

Urgency is arrival time plus priority times `priority_step` seconds. It never changes while a sequence waits
and later arrivals never overtake, so nothing starves. The most urgent running sequence is never preempted, so
there is always progress.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import Generic

from farthing.engine.block_pool import BlockPool, IntegrityError
from farthing.engine.prefix_cache import PrefixCache
from farthing.engine.sequence import S, Scheduled, Status

_KEY = attrgetter("key")

# Decoding sequences -> maximum number of prompt tokens in the step; None: no bound.
PromptLimit = Callable[[int], int | None]


class Scheduler(Generic[S]):
    """Owns the sequences, their blocks and the prefix cache. One thread uses it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        num_lookahead: int = 0,
        blocks: Seq[int] | None = None,
        prompt_limit: PromptLimit = lambda decodes: None,
    ) -> None:
        """blocks: which `num_blocks` of the cache; None: the first ones."""
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: got {max_num_batched_tokens}; expected at least "
                f"max_num_seqs = {max_num_seqs}, a token for each sequence"
            )
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_tokens = max_num_batched_tokens
        self.num_lookahead = num_lookahead  # cache slots reserved after the drafts, for drafting itself
        self.prompt_limit = prompt_limit
        self.prefix = PrefixCache(block_size, enable_prefix_caching)
        self.pool = BlockPool(num_blocks, self.prefix.forget, self.prefix.contains_block, blocks)
        self.waiting: list[S] = []  # waiting and running are ordered by urgency
        self.running: list[S] = []
        self.num_preemptions = 0
        self.worth_sharing = 32  # tokens of a prefix in progress that are worth a step of waiting
        self._computing: dict[bytes, S] = {}  # by hash of a prompt block: the running sequence to compute it
        self._watermark = max(1, num_blocks // 100)
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Nothing waits or runs."""
        return not self.waiting and not self.running

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that the pool can hold alone."""
        return self.pool.num_blocks * self.block_size

    def add(self, seq: S) -> None:
        """Let a sequence wait for admission."""
        if not 0 < len(seq.tokens) <= seq.max_len <= self.max_len:
            raise ValueError(
                f"a sequence of {len(seq.tokens)} tokens, growing to {seq.max_len}; expected at least one "
                f"and at most {self.max_len}, what the cache holds"
            )
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_KEY)

    def finish(self, seq: S) -> None:
        """Forget a sequence, wherever it is. Its blocks are free now."""
        if seq.status is Status.RUNNING:
            _remove(self.running, seq)
            self._free(seq)
        elif seq.status is Status.WAITING:
            _remove(self.waiting, seq)
        seq.status = Status.FINISHED

    def schedule(self) -> list[Scheduled[S]]:
        """The next step; empty if there is nothing to do. Every entry has to be committed or finished."""
        plan: list[Scheduled[S]] = []
        preempted = self.num_preemptions
        budget = self._schedule_decodes(plan)
        limit = self.prompt_limit(len(plan))
        if limit is not None:
            budget = min(budget, max(1, limit))
        for seq in self.running:
            if budget and seq.num_pending > 1:
                budget -= self._add(plan, seq, min(seq.num_pending, budget))
        if self.num_preemptions == preempted:
            self._admit(plan, budget)
        if not plan and self.running:
            raise IntegrityError("sequences run but none could be scheduled")
        return plan

    def commit(self, item: Scheduled[S], new_tokens: list[int]) -> None:
        """The step was computed: new_tokens are the accepted drafts and one more token, or [] mid-prompt."""
        seq = item.seq
        # A rejected draft leaves its slot behind num_computed, where the next token overwrites it.
        seq.num_computed += item.count + max(0, len(new_tokens) - 1)
        seq.tokens.extend(new_tokens)
        seq.drafts = []
        full = min(seq.num_computed, len(seq.tokens)) // self.block_size
        if self.prefix.enabled and full > seq.num_registered:
            self.prefix.extend(seq.hashes, seq.tokens, seq.salt, full)
            for i in range(seq.num_registered, full):
                self.prefix.register(seq.hashes[i], seq.blocks[i])
                self._computed(seq, seq.hashes[i])
            seq.num_registered = full

    def check(self) -> None:
        """Raise IntegrityError if blocks leaked or the books contradict each other."""
        self.pool.check(seq.blocks for seq in self.running)
        self.prefix.check()
        for seq in self.waiting:
            if seq.blocks:
                raise IntegrityError(f"waiting sequence {seq.id} holds blocks")
        rows = [seq.row for seq in self.running] + self._rows
        if sorted(rows) != list(range(self.max_num_seqs)):
            raise IntegrityError("rows of running sequences are not distinct")
        if any(seq.status is not Status.RUNNING for seq in self._computing.values()):
            raise IntegrityError("a block is awaited from a sequence that does not run")

    def _schedule_decodes(self, plan: list[Scheduled[S]]) -> int:
        """One token (and drafts) for everyone who decodes. Returns what is left of the budget."""
        decoding = [seq for seq in self.running if seq.num_pending == 1]
        budget = self.max_tokens
        # Drafts are a gamble: while prompts need the budget they get at most half of what is spare.
        spare = budget - len(decoding)
        if self.waiting or len(decoding) < len(self.running):
            spare //= 2
        for seq in decoding:
            if seq.status is not Status.RUNNING:
                continue  # preempted for a more urgent one
            room = min(spare, seq.max_len - len(seq.tokens) - 1)
            drafts = tuple(seq.drafts[: max(0, room)])
            if not self._reserve(seq, len(seq.tokens) + len(drafts) + self.num_lookahead):
                drafts = ()
                if not self._make_room(seq):
                    continue
            spare -= len(drafts)
            budget -= self._add(plan, seq, 1, drafts)
        return budget

    def _admit(self, plan: list[Scheduled[S]], budget: int) -> None:
        """Waiting sequences in order of urgency, none overtaking, as far as budget, rows and blocks go."""
        while budget and self.waiting and self._rows:
            seq = self.waiting[0]
            hits = self._match(seq)
            if self._awaits(seq, len(hits)):
                return
            need = self._blocks_for(len(seq.tokens)) - len(hits)
            revived = sum(self.pool.refs(block) == 0 for block in hits)
            reserve = self._watermark if self.running else 0
            if self.pool.num_free - revived < need + reserve:
                return
            self.waiting.pop(0)
            self.pool.share(hits)
            seq.blocks = hits + self.pool.allocate(need)
            seq.num_computed = seq.num_cached = len(hits) * self.block_size
            seq.num_registered = len(hits)
            for digest in seq.hashes[len(hits) :]:
                self._computing.setdefault(digest, seq)
            seq.row, seq.row_filled = self._rows.pop(), 0
            seq.status = Status.RUNNING
            insort(self.running, seq, key=_KEY)
            budget -= self._add(plan, seq, min(seq.num_pending, budget), first=True)

    def _match(self, seq: S) -> list[int]:
        if not (self.prefix.enabled and seq.read_cache):
            return []
        # A prompt found whole must still compute its last token: its logits are not in the cache.
        count = (len(seq.tokens) - 1) // self.block_size
        self.prefix.extend(seq.hashes, seq.tokens, seq.salt, count)
        return self.prefix.match(seq.hashes[:count])

    def _awaits(self, seq: S, num_hits: int) -> bool:
        """Whether running sequences will compute enough of the prefix after the blocks that were found."""
        ahead = 0
        for digest in seq.hashes[num_hits:]:
            if digest not in self._computing:
                break
            ahead += self.block_size
        return ahead >= self.worth_sharing and self.prefix.enabled and seq.read_cache

    def _computed(self, seq: S, digest: bytes) -> None:
        if self._computing.get(digest) is seq:
            del self._computing[digest]

    def _make_room(self, seq: S) -> bool:
        """A slot for the next token, preempting the least urgent; False if that is `seq` itself."""
        while not self._reserve(seq, len(seq.tokens)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _reserve(self, seq: S, length: int) -> bool:
        """Hold blocks for `length` tokens, as far as the sequence may ever grow."""
        need = self._blocks_for(min(length, seq.max_len)) - len(seq.blocks)
        if need > self.pool.num_free:
            return False
        if need > 0:
            seq.blocks += self.pool.allocate(need)
        return True

    def _preempt(self, seq: S) -> None:
        self.running.remove(seq)
        self._free(seq)
        seq.num_computed = seq.num_cached = 0
        seq.drafts = []
        seq.preemptions += 1
        self.num_preemptions += 1
        self.add(seq)

    def _free(self, seq: S) -> None:
        self.pool.release(reversed(seq.blocks))
        seq.blocks = []
        for digest in seq.hashes[seq.num_registered :]:
            self._computed(seq, digest)
        self._rows.append(seq.row)
        seq.row = -1

    def _add(
        self,
        plan: list[Scheduled[S]],
        seq: S,
        count: int,
        drafts: tuple[int, ...] = (),
        first: bool = False,
    ) -> int:
        decode = seq.num_pending == 1 and seq.num_output > 0
        sample = count == seq.num_pending
        plan.append(Scheduled(seq, seq.num_computed, count, drafts, sample, decode, first))
        return count + len(drafts)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def _remove(sequences: list[S], seq: S) -> None:
    index = bisect_left(sequences, seq.key, key=_KEY)
    if index == len(sequences) or sequences[index] is not seq:
        raise IntegrityError(f"sequence {seq.id} is not where its status says")
    del sequences[index]
