"""The scheduler against a model of memory: every slot that a token attends to has the right content."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farthing.engine.pace import Limits
from farthing.engine.prefetch import BlockStore
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence

SALTS = ("", "tenant")


def next_token(tokens: list[int]) -> int:
    """A fake model whose output depends on every previous token."""
    return zlib.crc32(bytes(tokens)) % 3


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


@dataclass
class Bounds(Limits):
    """Of prompt tokens per step."""

    together: int | None = None
    divided: int | None = None

    def prompt_tokens(self, decodes: int, shared: bool) -> int | None:
        return self.together if decodes else None

    def divided_tokens(self, decodes: int, shared: bool) -> int | None:
        return self.divided

    def scored_tokens(self, shared: bool) -> int:
        return 2


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, cancellations, good and bad drafts, in a cache that is too small."""

    block_size, num_blocks, max_num_seqs, budget, lookahead, caching = 2, 9, 3, 5, 0, True
    clients: tuple[str, ...] = ("",)

    def __init__(self) -> None:
        super().__init__()
        self.limits = Bounds()
        self.divided: list[Scheduled] = []  # whose layers are being computed
        self.scheduler = self.new_scheduler()
        self.memory: dict[int, tuple[str, tuple[int, ...]]] = {}  # slot -> salt and tokens up to it
        self.live: list[Sequence] = []
        self.expected: dict[int, list[int]] = {}
        self.count = 0
        self.clock = 0.0

    def new_scheduler(self, store: BlockStore | None = None) -> Scheduler:
        return Scheduler(
            self.num_blocks, self.block_size, self.max_num_seqs, self.budget, self.caching, self.lookahead,
            limits=self.limits, store=store,
        )  # fmt: skip

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        output=st.integers(1, 8),
        priority=st.sampled_from([-1, 0, 0, 0, 1]),
        salt=st.sampled_from(SALTS),
        read_cache=st.sampled_from([True, True, False]),
        client=st.integers(0, 5),
        scored=st.booleans(),
    )
    def add(
        self,
        prompt: list[int],
        output: int,
        priority: int,
        salt: str,
        read_cache: bool,
        client: int,
        scored: bool,
    ) -> None:
        self.clock += 1
        seq = Sequence(
            id=self.count,
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_len=len(prompt) + output,
            order=self.clock + 5 * priority,
            salt=salt,
            read_cache=read_cache,
            scored=scored,
            client=self.clients[client % len(self.clients)],
        )
        self.count += 1
        self.expected[seq.id] = continuation(prompt, output)
        self.scheduler.add(seq)
        self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.scheduler.finish(seq)
        self.live.remove(seq)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A step fails, half-written; some of its sequences end, and all others are computed again."""
        plan = self.scheduler.schedule()
        for item in plan:
            self.write(item)
            for position in range(item.start + item.num_tokens // 2, item.start + item.num_tokens):
                self.memory[self.slot(item.seq, position)] = ("half-written", ())
        ended = [item.seq for item in plan if data.draw(st.booleans())]
        self.live = [seq for seq in self.live if seq not in ended]
        self.divided = []
        shared = self.scheduler.worth_sharing
        self.scheduler = self.scheduler.renewed(self.live)
        self.scheduler.worth_sharing = shared

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def taint(self, data: st.DataObject) -> None:
        """What a sequence computed turns out to be wrong: nothing finds it any more."""
        seq = data.draw(st.sampled_from(self.scheduler.running))
        wrong = [b for b in seq.blocks if self.scheduler.pool.refs(b) == 1 and not seq.busy]
        seq.tainted = True
        self.scheduler.finish(seq)
        self.live.remove(seq)
        for block in wrong:
            for slot in range(block * self.block_size, (block + 1) * self.block_size):
                self.memory[slot] = ("wrong", ())

    @rule(together=st.none() | st.integers(1, 6), divided=st.none() | st.integers(1, 6))
    def pace(self, together: int | None, divided: int | None) -> None:
        self.limits.together, self.limits.divided = together, divided

    @rule(guess=st.lists(st.booleans(), max_size=3), wait=st.booleans())
    def step(self, guess: list[bool], wait: bool = False) -> None:
        under_way = {item.seq.id for item in self.divided}
        plan = self.scheduler.schedule()
        assert not under_way & {item.seq.id for item in plan}
        prompts = [item for item in plan if item.seq.num_pending - item.seq.redo > 1 or item.first]
        limit = self.limits.prompt_tokens(len(plan) - len(prompts), False)
        divided = [item for item in plan if item.seq.busy]
        assert not (divided and self.divided), "one at a time"
        assert limit is None or sum(item.count for item in prompts if not item.seq.busy) <= limit
        assert sum(item.count for item in divided) <= (self.limits.divided or 0)
        assert all(item.seq.num_pending > (limit or 0) for item in divided), "only long ones"
        assert sum(item.count for item in prompts if item.seq.scored) <= 2
        assert len({item.seq.id for item in plan}) == len(plan)
        assert sum(item.num_tokens for item in plan) <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        waiting = [s for s in self.scheduler.running if s.num_pending - s.redo == 1 and s.id not in under_way]
        decoding = [s for s in waiting if not s.redo]
        if not any(item.seq.redo for item in plan):
            assert {s.id for s in decoding} <= {item.seq.id for item in plan}, "decoding comes first"
        for item in plan:
            self.write(item)
            self.counted(item.seq)
        for item in plan:
            self.read(item)
        if divided:
            self.divided = divided
        for item in plan:
            if not item.seq.busy:
                self.commit(item, guess)
        if not wait or not plan:
            self.finish_divided(guess)

    def finish_divided(self, guess: list[bool]) -> None:
        """The last layer of busy sequences was computed; nothing else was written where they were."""
        for item in self.divided:
            self.read(item)
        live = {s.id for s in self.live}
        for item in self.divided:
            if item.seq.id in live:
                self.commit(item, guess)
        self.scheduler.settle(self.divided)
        self.divided = []

    def write(self, item: Scheduled) -> None:
        seq = item.seq
        tokens = seq.tokens[: item.start + item.count] + list(item.drafts)
        for position in range(item.start, item.start + item.num_tokens):
            slot = self.slot(seq, position)
            self.memory[slot] = (seq.salt, tuple(tokens[: position + 1]))
        assert len(seq.blocks) * self.block_size >= min(seq.max_len, item.start + item.num_tokens), (
            "a slot for each token"
        )

    def counted(self, seq: Sequence) -> None:
        """Every prompt token was found or has one reason, if the cache was asked."""
        if seq.missed is not None and not seq.preemptions:
            assert sum(seq.missed) + seq.num_cached == seq.num_prompt and min(seq.missed) >= 0
        assert (seq.missed is None) <= (not (self.caching and seq.read_cache))

    def read(self, item: Scheduled) -> None:
        """Check what the step attends to, and that no other sequence of the step wrote there."""
        tokens = item.seq.tokens + list(item.drafts)
        for position in range(item.start + item.num_tokens):
            salt, prefix = self.memory[self.slot(item.seq, position)]
            assert prefix == tuple(tokens[: position + 1])
            assert salt == item.seq.salt, "a cached block crossed salts"

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def commit(self, item: Scheduled, guess: list[bool]) -> None:
        seq = item.seq
        if not item.sample:
            self.scheduler.commit(item, [])
            return
        tokens = list(seq.tokens)
        taken: list[int] = []
        for ahead in range(1 + len(item.drafts)):
            token = next_token(tokens)
            taken.append(token)
            tokens.append(token)
            if len(tokens) == seq.max_len or ahead == len(item.drafts) or token != item.drafts[ahead]:
                break
        self.scheduler.commit(item, taken)
        assert seq.num_pending - seq.redo == 1
        if len(seq.tokens) == seq.max_len:
            assert seq.tokens == self.expected[seq.id], "preempted or not, the same tokens"
            self.scheduler.finish(seq)
            self.live.remove(seq)
            return
        tokens = list(seq.tokens)
        for good in guess:
            token = next_token(tokens)
            tokens.append(token if good else (token + 1) % 3)
        seq.drafts = tokens[len(seq.tokens) :]

    @invariant()
    def books(self) -> None:
        self.scheduler.check()
        assert {s.id for s in self.live} == {s.id for s in self.scheduler.running + self.scheduler.waiting}
        assert self.scheduler.shares.present == {s.client for s in self.live}

    def teardown(self) -> None:
        """No starvation: without new arrivals every sequence finishes, and all blocks are free again.

        As the engine does, steps go on until the scheduler is idle, so that the layers of a prompt whose
        request was cancelled are settled.
        """
        bound = 10 + sum(2 * s.max_len for s in self.live) * (1 + len(self.live))
        for _ in range(bound):
            if self.scheduler.idle:
                break
            self.step([True, False])
            self.books()
        assert not self.live
        assert self.scheduler.idle
        assert self.scheduler.pool.num_free == self.num_blocks
        assert self.scheduler.schedule() == []


COMMON = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
