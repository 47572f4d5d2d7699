"""The scheduler with blocks on disk, against the same model of memory; sequences that wait for reads."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from farthing.engine.prefetch import Load
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import PrefixCache

from .scheduler_machine import COMMON, SchedulerMachine
from .test_scheduler import run, sequence

Content = tuple[str, tuple[int, ...]]


class FakeStore:
    """Stores the contents of memory slots; tests decide when reads end."""

    def __init__(self, size: int, memory: dict[int, Content]) -> None:
        self.size, self.memories = size, [memory]  # by kind; a state is one slot
        self.kept: dict[tuple[int, bytes], list[Content]] = {}
        self.loads: list[Load[Any]] = []
        self.known: Any = []

    def attach(self, known: Any) -> None:
        self.known = known

    def find(self, hashes: Any, kind: int = 0) -> int:
        return next((i for i, digest in enumerate(hashes) if (kind, digest) not in self.kept), len(hashes))

    def read(self, load: Load[Any]) -> None:
        self.loads.append(load)

    def places(self, kind: int, block: int) -> list[int]:
        if kind == 2:  # of `tests.engine.test_kinds`: states come after one window
            return [block]
        return [block * self.size + i for i in range(self.size)]

    def computed(self, parent: bytes, hashes: list[bytes], kind: int = 0) -> None:
        for digest in hashes:
            block, _ = self.known[kind].locate(digest) or (None, 0)
            if block is not None and self.memories[kind]:
                self.kept[kind, digest] = [self.memories[kind][place] for place in self.places(kind, block)]

    def used(self, hashes: list[bytes]) -> None:
        assert hashes
        self.last = hashes

    def fill(self, load: Load[Any], good: int) -> int:
        """Read the first `good` blocks that still exist."""
        self.loads.remove(load)
        for number, (kind, digest, block) in enumerate(load.entries):
            if number == good or (kind, digest) not in self.kept:
                return number
            for place, content in zip(self.places(kind, block), self.kept[kind, digest], strict=True):
                self.memories[kind][place] = content
        return len(load.hashes)


class OnDisk(SchedulerMachine):
    """Reads that end late, early or not at all; blocks that are evicted from memory and from disk."""

    def __init__(self) -> None:
        super().__init__()
        self.store = FakeStore(self.block_size, self.memory)
        self.begin()

    def memories(self) -> list[dict[int, Content]]:
        """By kind."""
        return [self.memory]

    def begin(self) -> None:
        """A scheduler of another process."""
        self.store.memories = self.memories()
        self.scheduler = self.new_scheduler(self.store)
        self.scheduler.worth_sharing = 1

    @precondition(lambda self: self.store.loads)
    @rule(data=st.data())
    def read_ends(self, data: st.DataObject) -> None:
        load = data.draw(st.sampled_from(self.store.loads))
        good = data.draw(st.integers(0, len(load.hashes)))
        self.scheduler.loaded(load, self.store.fill(load, good))

    @precondition(lambda self: self.store.kept)
    @rule(data=st.data())
    def evict_from_disk(self, data: st.DataObject) -> None:
        del self.store.kept[data.draw(st.sampled_from(sorted(self.store.kept)))]

    @rule()
    def restart(self) -> None:
        """Simulate another process with the same files."""
        if not (self.live or self.divided or self.store.loads):
            for memory in self.memories():
                memory.clear()
            self.begin()

    def teardown(self) -> None:
        bound = 10 + sum(2 * s.max_len for s in self.live) * (1 + len(self.live))
        for _ in range(bound):
            for load in list(self.store.loads):
                self.scheduler.loaded(load, self.store.fill(load, len(load.hashes)))
            if not self.live:
                break
            self.step([True, False])
            self.books()
        super().teardown()


class Stored(OnDisk):
    """Of one kind."""


class StoredRoomy(Stored):
    num_blocks, block_size = 30, 1


class StoredClients(Stored):
    clients, num_blocks = ("a", "b", "c"), 20


TestStored = Stored.TestCase
TestStored.settings = COMMON
TestStoredRoomy = StoredRoomy.TestCase
TestStoredRoomy.settings = settings(COMMON, max_examples=40)
TestStoredClients = StoredClients.TestCase
TestStoredClients.settings = settings(COMMON, max_examples=40)


def scheduler_with(prompt: list[int], num_blocks: int = 32) -> tuple[Scheduler, FakeStore]:
    """A scheduler with blocks of 4 tokens; those of `prompt` are only on disk."""
    store = FakeStore(4, {})
    hashes: list[bytes] = []
    PrefixCache(4).extend(hashes, prompt, "", len(prompt) // 4)
    store.kept = {(0, digest): [("", (0,))] * 4 for digest in hashes}
    scheduler = Scheduler(num_blocks, 4, max_num_seqs=4, max_num_batched_tokens=64, store=store)
    scheduler.worth_sharing = 8
    return scheduler, store


def test_others_continue_while_a_prefix_is_read() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt)
    stored, other = sequence(0, prompt), sequence(1, [7] * 6)
    scheduler.add(stored)
    scheduler.add(other)
    assert scheduler.num_waiting == 2 and scheduler.waiting == [stored, other]
    assert [item.seq for item in scheduler.schedule()] == [other]
    (load,) = store.loads
    assert load.hashes == stored.hashes[:5] and len(set(load.blocks)) == 5
    scheduler.loaded(load, store.fill(load, 5))
    scheduler.check()
    run(scheduler, [])
    first = next(item for item in scheduler.schedule() if item.seq is stored)
    assert (first.start, first.count) == (20, 2)
    assert stored.num_cached == 20 and scheduler.num_waiting == 0
    scheduler.finish(stored)
    assert store.last == stored.hashes[:5], "what is read remains longer than what is not"


def test_failed_read_is_computed_and_not_retried() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt)
    seq = sequence(0, prompt)
    scheduler.add(seq)
    assert scheduler.idle and not scheduler.schedule()
    (load,) = store.loads
    scheduler.loaded(load, 2)
    store.loads.clear()
    again = scheduler.schedule()
    assert not again and len(store.loads) == 1, "the rest has not been tried yet"
    scheduler.loaded(store.loads[0], 0)
    (item,) = scheduler.schedule()
    assert (item.start, item.count) == (8, 14)


def test_sequences_with_the_same_prefix_share_one_read() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt)
    for number in range(3):
        scheduler.add(sequence(number, [*prompt, number]))
    (load,) = store.loads
    assert len(load.waiters) == 3
    scheduler.loaded(load, store.fill(load, 5))
    assert [(i.start, i.count) for i in scheduler.schedule()] == [(20, 3)] * 3


def test_cancelled_sequence_frees_the_blocks_of_its_read() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt)
    seq = sequence(0, prompt)
    scheduler.add(seq)
    scheduler.finish(seq)
    assert scheduler.num_waiting == 0
    scheduler.check()
    scheduler.loaded(store.loads[0], 5)
    scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_another_salt_or_a_short_prefix_reads_nothing() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt)
    scheduler.add(sequence(0, prompt, salt="tenant"))
    scheduler.add(sequence(1, [*prompt[:4], *[9] * 9]))
    assert not store.loads


def test_read_needs_free_blocks() -> None:
    prompt = list(range(22))
    scheduler, store = scheduler_with(prompt, num_blocks=8)
    running = sequence(0, [7] * 15)
    scheduler.add(running)
    run(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, prompt))
    assert not store.loads
    assert {item.seq for item in scheduler.schedule()} == {running}
    scheduler.finish(running)
    assert not scheduler.schedule()
    assert len(store.loads) == 1
