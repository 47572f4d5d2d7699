"""Selects the sequences and tokens of the next step.

Continuous batching (Yu et al. 2022) with chunked prefill (Agrawal et al. 2024) under one token budget:
every decoding sequence gets its token first, then prompts in progress, then waiting ones. While sequences
decode, `limits` further bounds the prompt tokens of a step. Blocks for a whole prompt are allocated on
admission, so only decoding can run out of blocks; then the least urgent running sequence is preempted: its
blocks are freed and it recomputes its tokens later.

Where `limits` allows more prompt tokens whose layers several steps compute (`core.py`), their sequences
are busy until `settle`: they are neither planned again nor preempted, and if they end, their blocks stay
reserved. Meanwhile, in every second step at most, prompts that fit into a step are planned, and any prompts
of other clients that are next.

A waiting prompt whose next blocks are being computed by a running one waits for them, so prompts that arrive
together compute a shared prefix once. A prompt whose next blocks are on disk waits until they are read,
without delaying those behind it (`prefetch.py`).

Clients share by `shares`, in tokens: the least served client computes and is admitted first. Sequences of one
client are ordered by urgency: arrival time plus priority times `priority_step` seconds. Urgency never changes
while a sequence waits, so later arrivals cannot overtake it indefinitely.

A client with less than its share of rows and blocks does not wait for others to finish: sequences of clients
above their share are preempted for it, least urgent first, but never a client's most urgent one. The most
urgent running sequence is only preempted while busy ones hold the blocks, so there is always progress.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Generic

from farthing.engine.kinds import Kinds
from farthing.engine.pace import Interference, Limits, Room
from farthing.engine.prefetch import BlockStore, Load, Prefetch
from farthing.engine.sequence import (
    KEY,
    BlockPool,
    IntegrityError,
    Known,
    PrefixCache,
    Queues,
    S,
    Scheduled,
    Sequence,
    Status,
    remove,
)
from farthing.model.kinds import CHECKPOINT_TOKENS
from farthing.shares import Shares


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
        limits: Limits | None = None,
        store: BlockStore | None = None,
        windows: Mapping[int, Seq[int]] | None = None,
        slots: Seq[int] = (),
        every: int = CHECKPOINT_TOKENS,
    ) -> None:
        """blocks: the `num_blocks` to use; None: the first ones. store: blocks on disk.

        windows, slots, every: of the kinds that forget, as in `Kinds`.
        """
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: got {max_num_batched_tokens}; expected at least "
                f"max_num_seqs = {max_num_seqs}, a token for each sequence"
            )
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_tokens = max_num_batched_tokens
        self.num_lookahead = num_lookahead  # cache slots reserved after the drafts, for drafting itself
        self.limits = limits or Limits()
        self.prefix = PrefixCache(block_size, enable_prefix_caching)
        self.pool = BlockPool(num_blocks, self.prefix.forget, self.prefix.contains_block, blocks)
        step = max_num_seqs, max_num_batched_tokens, num_lookahead
        self.kinds = Kinds(self.prefix, windows or {}, slots, step, every)
        self.pools = [self.pool, *(kind.pool for kind in self.kinds.all)]
        self.known: list[Known] = [self.prefix, *(kind.known for kind in self.kinds.all)]
        self.prefetch: Prefetch[S] = Prefetch(store, self.pools, self.known, self.kinds)
        self.shares = Shares(ahead=1)  # of a token: a client that returns is next
        self.interference = Interference()
        self.running: list[S] = []  # by urgency, like each client's queue
        self._queues: Queues[S] = Queues()
        self.num_preemptions = 0
        self._ended: list[S] = []  # busy sequences that were finished
        self._beside = False  # whether the last step had prompts next to busy ones
        self.worth_sharing = 32  # minimum tokens of a prefix, in progress or on disk, to wait for it
        self._computing: dict[bytes, S] = {}  # by hash of a prompt block: the running sequence to compute it
        self._watermark = max(1, num_blocks // 100)
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs, except sequences waiting for the disk."""
        return not (self._queues or self.running or self._ended)

    @property
    def waiting(self) -> list[S]:
        """Sequences that wait, by urgency."""
        return sorted([*chain(*self._queues.values()), *self.prefetch.waiters], key=KEY)

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences."""
        return sum(map(len, list(self._queues.values()))) + sum(1 for _ in self.prefetch.waiters)

    def gauges(self) -> tuple[int, int, float, int]:
        """(running sequences, waiting ones, used share of the cache, preemptions so far); from any thread."""
        return len(self.running), self.num_waiting, self.pool.usage, self.num_preemptions

    def add(self, seq: S) -> None:
        """Let a sequence wait for admission."""
        most = self.pool.num_blocks * self.block_size
        if not 0 < len(seq.tokens) <= seq.max_len <= most:
            raise ValueError(
                f"a sequence of {len(seq.tokens)} tokens, growing to {seq.max_len}; expected at least one "
                f"and at most {most}, the size of the cache"
            )
        if seq.status is Status.NEW:
            self.shares.enter(seq.client)
        seq.status = Status.WAITING
        if self.prefetch.store is None or not self._read(seq, self._match(seq)):
            self._queues.push(seq)

    def loaded(self, load: Load[S], good: int) -> None:
        """Handle the end of a read whose first `good` blocks are filled."""
        for seq in self.prefetch.finish(load, good):
            self._queues.push(seq)

    def finish(self, seq: S) -> None:
        """Forget a sequence, wherever it is. Its blocks are free now."""
        if seq.status is Status.RUNNING:
            remove(self.running, seq)
            if self._computing:
                self._give_up(seq)
            if seq.busy:
                self._ended.append(seq)
            else:
                self._free(seq)
        elif seq.status is Status.WAITING and not self.prefetch.leave(seq):
            self._queues.drop(seq)
        if seq.status in (Status.RUNNING, Status.WAITING):
            self.shares.leave(seq.client)
        seq.status = Status.FINISHED

    def schedule(self) -> list[Scheduled[S]]:
        """The next step; empty if there is nothing to do. Every entry has to be committed or finished, and
        settled if its sequence is busy now."""
        plan: list[Scheduled[S]] = []
        # First, because a sequence must not be preempted once it is in the plan.
        if self._queues and len(self.shares.present) > 1:
            self._give_way()
        preempted = self.num_preemptions
        budget = self._schedule_decodes(plan)
        if not self._queues and len(plan) == len(self.running):  # no prompts: the usual step
            return plan
        busy = {seq.client for seq in self.running if seq.busy} | {seq.client for seq in self._ended}
        shared, decodes = len(self.shares.present) > 1, len(plan)
        # With several clients a step without decodes is bounded too: it delays a request of another client
        # that arrives while it runs, as if that one were decoding already.
        limit = self.limits.prompt_tokens(max(decodes, int(shared)), shared) or budget
        # Prompts next to busy ones get every second step at most, or a stream of short prompts would keep
        # those from finishing. If nothing decodes, the whole step goes to the busy ones, which end sooner.
        beside, self._beside = self._beside, False
        if busy and (beside or not plan or not self._passes(limit, busy)):
            return plan
        # One group of prompts is divided at a time, and only if that keeps something from waiting.
        divided = 0 if busy or not plan else self.limits.divided_tokens(decodes, shared) or 0
        # Nothing decodes, and the next prompt is longer than the limit: it would only take more steps.
        if limit < budget and not plan and not self._passes(limit):
            limit = budget
        room = Room(budget, limit, divided, self.limits.scored_tokens(shared) or budget)
        # Blocks freed by preempting for a decode belong to the sequences that decode: admitting a prompt into
        # them would preempt again in the next step.
        self._schedule_prompts(plan, room, admit=self.num_preemptions == preempted)
        if not plan and self.running:
            raise IntegrityError("sequences run but none could be scheduled")
        for item in plan[decodes:]:
            item.seq.busy = room.divides(item.seq.num_pending)
        self._beside = any(not item.seq.busy for item in plan[decodes:])
        return plan

    def copy_states(self, copy: Callable[[list[tuple[int, int]]], None]) -> None:
        """Have the states copied that checkpoints, prefix hits and drafts need: (source, target) slots.

        To be called, if there are any, before each step and after its tokens are committed.
        """
        copies, kept = self.kinds.take_copies()
        copy(copies)
        self.prefetch.copied(kept)

    def cached(self, tokens: list[int], salt: str) -> list[tuple[int, bytes, int]]:
        """Kind, hash and block of what the prefix cache has to continue a prompt, without its tails."""
        seq = Sequence(-1, tokens, len(tokens), len(tokens), salt=salt)
        self.prefix.extend(seq.hashes, tokens, salt, (len(tokens) - 1) // self.block_size)
        blocks = self.prefix.match(seq.hashes)
        count = self.kinds.usable(seq, len(blocks), tails=False)
        found = [(0, digest, block) for digest, block in zip(seq.hashes, blocks[:count], strict=False)]
        return found + self.kinds.present(seq, count)

    @property
    def unused(self) -> bool:
        """Whether no block or slot is referenced."""
        return not any(pool.usage for pool in self.pools)

    def renewed(self, again: Iterable[S] = ()) -> Scheduler[S]:
        """A scheduler of the same blocks without any prefix, in which the sequences `again` wait to be
        computed from their first token. Reads from disk continue. This one must not be used any more."""
        renewed: Scheduler[S] = Scheduler(
            self.pool.num_blocks,
            self.block_size,
            self.max_num_seqs,
            self.max_tokens,
            self.prefix.enabled,
            self.num_lookahead,
            self.pool.blocks,
            self.limits,
            self.prefetch.store,
            *self.kinds.forms,
        )
        if (listener := self.prefix.listener) is not None:
            listener.cleared()
            renewed.prefix.listener = listener
        renewed.num_preemptions = self.num_preemptions
        renewed.prefetch.take_over(self.prefetch)
        for seq in again:
            seq.preemptions += seq.status is Status.RUNNING
            seq.reset()
            seq.status = Status.NEW
            renewed.add(seq)
        return renewed

    def settle(self, plan: Seq[Scheduled[S]]) -> None:
        """The layers of busy entries were computed, or are not wanted any more."""
        for item in plan:
            item.seq.busy = False
        for seq in self._ended:
            self._free(seq, whole=False)
        self._ended.clear()

    def commit(self, item: Scheduled[S], new_tokens: list[int]) -> None:
        """The step was computed: new_tokens are the accepted drafts and one more token, or [] mid-prompt."""
        seq, before = item.seq, item.seq.num_computed
        # A rejected draft's slot is after num_computed, where the next token overwrites it.
        seq.num_computed += item.count + max(0, len(new_tokens) - 1)
        seq.tokens.extend(new_tokens)
        seq.drafts = []
        seq.redo = 0
        if seq.backup >= 0 and not self.kinds.settle_drafts(seq, len(new_tokens) > len(item.drafts)):
            seq.num_computed, seq.redo = before, seq.num_computed - before
        full = min(seq.num_computed, len(seq.tokens)) // self.block_size
        if self.prefix.enabled and full > seq.num_registered:
            self.prefix.extend(seq.hashes, seq.tokens, seq.salt, full)
            self.prefix.computed(seq, full)
            for digest in seq.hashes[seq.num_registered : full]:
                if self._computing.get(digest) is seq:
                    del self._computing[digest]
            if self.prefetch.store is not None:
                self.prefetch.computed(seq.hashes, seq.num_registered, full)
            seq.num_registered = full
        if (seq.held or seq.slot >= 0) and (kept := self.kinds.commit(seq, before)):
            self.prefetch.kept(seq.hashes, kept)

    def check(self) -> None:
        """Raise IntegrityError if blocks leaked or invariants are violated."""
        owners = self.running + self._ended
        self.pool.check([*(seq.blocks for seq in owners), *self.prefetch.held])
        self.kinds.check(owners, self.prefetch.others)
        if any(self.pool.refs(block) for block in self.prefix.check()):
            raise IntegrityError("the tail of a sequence that ended is in use")
        for seq in self.waiting:
            if seq.blocks:
                raise IntegrityError(f"waiting sequence {seq.id} holds blocks")
        if not all(self._queues.values()):
            raise IntegrityError("a client without waiting sequences has a queue")
        rows = [seq.row for seq in owners] + self._rows
        if sorted(rows) != list(range(self.max_num_seqs)):
            raise IntegrityError("rows of running sequences are not distinct")
        if any(seq.status is not Status.RUNNING for seq in self._computing.values()):
            raise IntegrityError("a sequence waits for a block of one that is not running")

    def _schedule_decodes(self, plan: list[Scheduled[S]]) -> int:
        """One token (and drafts) per decoding sequence. Returns what is left of the budget."""
        several = len(self.shares.present) > 1
        order = by_claim(self.running) if several else list(self.running)
        decoding = [seq for seq in order if seq.num_pending - seq.redo == 1 and not seq.busy]
        budget = self.max_tokens
        # Drafts are a gamble: while prompts need the budget they get at most half of what is spare.
        spare = budget - len(decoding)
        if self._queues or len(decoding) < len(self.running):
            spare //= 2
        for seq in decoding:
            if seq.status is not Status.RUNNING:
                continue  # preempted for one with a better claim
            redo = seq.redo
            if redo and redo > spare and seq is not decoding[0]:
                continue  # only the one with the best claim may compute tokens again in place of others
            room = min(spare, seq.max_len - len(seq.tokens) - 1)
            drafts = () if redo else tuple(seq.drafts[: max(0, room)])
            if not self._reserve(seq, len(seq.tokens) + len(drafts) + self.num_lookahead):
                drafts = ()
                if not self._make_room(seq, order):
                    continue
            if drafts and not self.kinds.guard(seq):
                drafts = ()
            spare -= len(drafts) + redo
            budget -= self._add(plan, seq, 1 + redo, 1, drafts)
            if redo and budget <= 0:
                break
        return budget

    def _schedule_prompts(self, plan: list[Scheduled[S]], room: Room, admit: bool) -> None:
        """Prompts that run and, if `admit`, ones that wait, as far as there is room.

        Clients take turns by tokens served; a client's running prompts come before its waiting ones. Where
        the next one to be admitted does not fit, none overtakes it. Clients that delayed others pause.
        """
        begun: dict[str, Iterator[S]] = {}
        paused: set[str] = set()
        if self.interference.owed:
            paused = self.interference.paused({item.seq.client for item in plan})
        prompts = [seq for seq in self._prompts() if seq.client not in paused]
        for owner in dict.fromkeys(seq.client for seq in prompts):
            begun[owner] = iter([seq for seq in prompts if seq.client == owner])
        queued = self._queues.keys() - paused if admit else set()
        while room.left and (begun or queued):
            client = self.shares.next(begun.keys() | queued, self._urgency)
            seq = next(begun[client], None) if client in begun else None
            if seq is not None:
                pending, most = seq.num_pending, self.kinds.until(seq)
                if count := room.take(pending, seq.scored, most):
                    self._add(plan, seq, count, pending)
                continue
            begun.pop(client, None)
            if client not in queued:
                continue
            head = self._queues[client][0]
            hits = self._match(head)
            pending = len(head.tokens) - len(hits) * self.block_size
            if self.prefetch.store is not None and self._read(head, hits):
                self._queues.drop(head)
            elif not room.offers(pending, head.scored) or (self._computing and self._awaits(head, len(hits))):
                queued.discard(client)
            elif self._admit(head, hits):
                pending, most = head.num_pending, self.kinds.until(head)
                count = room.take(pending, head.scored, most) or 1
                self._add(plan, head, count, pending, first=True)
            else:
                queued.clear()
            queued &= self._queues.keys()

    def _urgency(self, client: str) -> tuple[float, int]:
        """Orders clients that were served equally. One whose prompts all run comes first."""
        queue = self._queues.get(client)
        return queue[0].key if queue else (float("-inf"), 0)

    def _admit(self, seq: S, hits: list[int]) -> bool:
        """Let a waiting sequence run, if rows and blocks allow it. hits: blocks of its prefix."""
        if not self._rows or not self._fits(seq, hits):
            return False
        self._queues.drop(seq)
        shared, cached, others = list(hits), len(hits) * self.block_size, list[int]()
        rest = seq.tokens[cached:-1][: self.block_size] if seq.read_cache else []
        if tail := self.prefix.take_tail(seq.hashes[: len(hits)], seq.salt, rest, self.kinds.whole_tails):
            (block, *others), count = tail
            shared, cached = [*hits, block], cached + count
        if shared:
            self.pool.share(shared)
        seq.blocks = shared + self.pool.allocate(self._blocks_for(len(seq.tokens)) - len(shared))
        seq.num_computed = seq.num_cached = cached
        seq.num_registered = len(hits)
        if self.prefix.enabled and seq.read_cache and not seq.preemptions:
            seq.missed = self.prefix.missed(seq, len(self.prefix.match(seq.hashes)))
        self.kinds.admit(seq, len(hits), cached, others)
        for digest in seq.hashes[len(hits) :]:
            self._computing.setdefault(digest, seq)
        seq.row, seq.row_filled = self._rows.pop(), 0
        seq.status = Status.RUNNING
        insort(self.running, seq, key=KEY)
        return True

    def _fits(self, seq: S, hits: list[int]) -> bool:
        """Whether there are free blocks for all tokens besides the cached ones, and a slot."""
        if not self.kinds.fits():
            return False
        need = self._blocks_for(len(seq.tokens)) - len(hits)
        revived = sum(self.pool.refs(block) == 0 for block in hits)
        reserve = self._watermark if self.running else 0
        return self.pool.num_free - revived >= need + reserve

    def _read(self, seq: S, hits: list[int]) -> bool:
        """Make a sequence wait for blocks of its prefix on disk. Returns False if there are none."""
        if not (self.prefix.enabled and seq.read_cache):
            return False
        wanted = seq.hashes[len(hits) : (len(seq.tokens) - 1) // self.block_size]
        least = -(-self.worth_sharing // self.block_size)
        return self.prefetch.wait(seq, hits, wanted, least, lambda: self._fits(seq, hits))

    def _give_way(self) -> None:
        """Preempt for the next client if it holds less than its share and others hold more than theirs."""
        clients = len(self.shares.present)
        # The client that is admitted next, so that the freed blocks are not given to another one.
        poorest = self.shares.next(self._queues, self._urgency)
        # Blocks of its prefix that are cached count too: preempting may be what evicts them.
        need = self._blocks_for(len(self._queues[poorest][0].tokens))
        rows = len(self._rows), self.max_num_seqs
        for seq in victims(self.running, poorest, need, self._watermark, rows, clients, self.pool):
            self._preempt(seq)

    def _passes(self, limit: int, busy: Set[str] | None = None) -> bool:
        """Whether the next prompt should not wait for a long step or busy sequences: it is short, or of
        another client than these."""
        # Only the prompt whose turn it is counts: if a later one could pass, it would overtake that one.
        prompts = self._prompts() + [queue[0] for queue in self._queues.values()]
        if not prompts:
            return False
        client = self.shares.next({seq.client for seq in prompts}, self._urgency)
        if busy is not None and client not in busy:
            return True
        first = next(seq for seq in prompts if seq.client == client)
        # What is left to compute decides: a long prompt whose prefix is cached is a short one.
        hits = [] if first.status is Status.RUNNING else self._match(first)
        return first.num_pending - len(hits) * self.block_size <= limit

    def _match(self, seq: S) -> list[int]:
        if not (self.prefix.enabled and seq.read_cache):
            return []
        # A prompt found whole must still compute its last token: its logits are not in the cache.
        count = (len(seq.tokens) - 1) // self.block_size
        self.prefix.extend(seq.hashes, seq.tokens, seq.salt, count)
        hits = self.prefix.match(seq.hashes[:count])
        return hits[: self.kinds.usable(seq, len(hits))]

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

    def _make_room(self, seq: S, order: list[S]) -> bool:
        """A slot for the next token, preempting from the end of `order`; False if that is `seq` itself."""
        while not self._reserve(seq, len(seq.tokens)):
            victim = order.pop()
            if victim.status is not Status.RUNNING or victim.busy:
                continue
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _reserve(self, seq: S, length: int) -> bool:
        """Hold blocks that keep `length` tokens, as far as the sequence may ever grow."""
        need = self._blocks_for(min(length, seq.max_len)) - len(seq.blocks)
        if need > self.pool.num_free:
            return False
        if need > 0:
            seq.blocks += self.pool.allocate(need)
        return True

    def _preempt(self, seq: S) -> None:
        self.running.remove(seq)
        self._free(seq)
        seq.reset()
        seq.preemptions += 1
        self.num_preemptions += 1
        self.add(seq)

    def _free(self, seq: S, whole: bool = True) -> None:
        """Give back what a sequence holds. whole: False if its last step was given up half-way."""
        if seq.tainted:
            self._forget(seq)
        else:  # what is needed to continue a sequence at its end stays in the prefix cache
            full = seq.num_registered
            tail = seq.tokens[full * self.block_size : seq.num_computed]
            others: list[tuple[Known, int]] = []
            if seq.held or seq.slot >= 0:
                kept, others = self.kinds.leave(seq, whole)
                self.prefetch.kept(seq.hashes, kept)
            if self.prefix.enabled and tail and (whole or not self.kinds.whole_tails):
                self.prefix.keep_tail(seq.hashes[:full], seq.salt, tail, seq.blocks[full], others)
        self.pool.release(reversed(seq.blocks))
        seq.blocks = []
        if seq.held or seq.slot >= 0:
            self.kinds.release(seq)
        if self.prefetch.store is not None and not seq.tainted:
            self.prefetch.used(seq.hashes[: seq.num_registered])
        if self._computing:
            self._give_up(seq)
        self._rows.append(seq.row)
        seq.row = -1

    def _forget(self, seq: S) -> None:
        """Leave nothing: no later prompt finds a block that this sequence computed, or read."""
        for known in self.known:
            for digest in seq.hashes:
                if digest in known:
                    known.forget(known[digest])

    def _prompts(self) -> list[S]:
        """Running prompts that can be continued."""
        return [seq for seq in self.running if seq.num_pending - seq.redo > 1 and not seq.busy]

    def _give_up(self, seq: S) -> None:
        """No sequence should wait for the blocks that this one did not compute."""
        for digest in seq.hashes[seq.num_registered :]:
            self._computed(seq, digest)

    def _add(
        self,
        plan: list[Scheduled[S]],
        seq: S,
        count: int,
        pending: int,
        drafts: tuple[int, ...] = (),
        first: bool = False,
    ) -> int:
        """Plan `count` of a sequence's tokens; pending: those that were never in the cache."""
        decode = pending == 1 and seq.num_output > 0
        sample = count == pending + seq.redo
        if seq.held:
            self.kinds.grow(seq, seq.num_computed + count + len(drafts) + self.num_lookahead)
        plan.append(Scheduled(seq, seq.num_computed, count, drafts, sample, decode, first))
        self.shares.charge(seq.client, count + len(drafts))
        return count + len(drafts)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def by_claim(running: Seq[S]) -> list[S]:
    """Running sequences, the one to be preempted first at the end.

    That is the least urgent one of the client that holds most blocks.

    Rows and blocks are shared equally, too: a client above its share gives way to one below.
    """
    held = held_blocks(running)
    return [*running[:1], *sorted(running[1:], key=lambda seq: (held[seq.client], seq.key))]


def held_blocks(running: Seq[S]) -> Counter[str]:
    """Blocks by client; shared ones count for each."""
    held: Counter[str] = Counter()
    for seq in running:
        held[seq.client] += len(seq.blocks)
    return held


def victims(
    running: Seq[S],
    client: str,
    need: int,
    spare: int,
    rows: tuple[int, int],
    num_clients: int,
    pool: BlockPool,
) -> list[S]:
    """The sequences to preempt so that a client gets a row and `need` blocks; none without a claim.

    running: by urgency. spare: blocks that stay free in addition. rows: free ones and their total number.
    Sequences of clients above their share give way, least urgent first, but never a client's most urgent one.
    """
    held, used = held_blocks(running), Counter(seq.client for seq in running)
    free_rows, max_rows = rows
    most_rows, most_blocks = max(1, max_rows // num_clients), pool.num_blocks // num_clients
    if used[client] >= most_rows or held[client] + need > most_blocks:
        return []
    lack = need + spare - pool.num_free
    chosen: list[S] = []
    for seq in reversed(running[1:]):
        if lack <= 0 and (free_rows or chosen):
            break
        owner = seq.client
        spared = used[owner] < 2 or owner == client
        if spared or seq.busy or (used[owner] <= most_rows and held[owner] <= most_blocks):
            continue
        chosen.append(seq)
        used[owner] -= 1
        held[owner] -= len(seq.blocks)
        lack -= sum(pool.refs(block) == 1 for block in seq.blocks)
    return chosen if lack <= 0 else []
