"""The scheduler with windows and states, against a model of memory: a state is the tokens it has seen."""

from __future__ import annotations

import pytest
from hypothesis import settings

from farthing.engine.prefetch import BlockStore
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence
from farthing.model.kinds import window_blocks

from .scheduler_machine import COMMON, SchedulerMachine
from .test_prefetch import OnDisk
from .test_scheduler import run, sequence

Content = tuple[str, tuple[int, ...]]


class Kinds(SchedulerMachine):
    """A window and a state, with few blocks and slots to spare."""

    windows: tuple[int, ...] = (3,)
    spare, slots, every = 2, 5, 4

    def __init__(self) -> None:
        super().__init__()
        self.window_memory: list[dict[int, Content]] = [{} for _ in self.windows]
        self.states: dict[int, Content] = {}

    def new_scheduler(self, store: BlockStore | None = None) -> Scheduler:
        forms = {}
        for number, window in enumerate(self.windows):
            need = window_blocks(window, self.block_size, self.max_num_seqs, self.budget, self.lookahead)
            first = 100 * number
            forms[window] = range(first, first + need + self.spare)
        return Scheduler(
            self.num_blocks, self.block_size, self.max_num_seqs, self.budget, self.caching, self.lookahead,
            limits=self.limits, store=store, windows=forms, slots=range(self.slots), every=self.every,
        )  # fmt: skip

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """All sources are read before a target is written."""
        found = {target: self.states.get(source, ("", ())) for source, target in pairs}
        assert len(found) == len(pairs)
        self.states |= found

    def write(self, item: Scheduled) -> None:
        self.scheduler.copy_states(self.copy)
        super().write(item)
        seq = item.seq
        tokens = seq.tokens[: item.start + item.count] + list(item.drafts)
        for memory, held in zip(self.window_memory, seq.held, strict=True):
            for position in range(item.start, item.start + item.num_tokens):
                block = held.blocks[position // self.block_size]
                slot = block * self.block_size + position % self.block_size
                memory[slot] = (seq.salt, tuple(tokens[: position + 1]))
        if self.slots:
            if item.start:
                source = seq.slot if seq.backup < 0 else seq.backup
                assert self.states[source] == (seq.salt, tuple(tokens[: item.start])), "a fresh run's state"
            self.states[seq.slot] = (seq.salt, tuple(tokens))

    def read(self, item: Scheduled) -> None:
        super().read(item)
        seq, size = item.seq, self.block_size
        tokens = seq.tokens + list(item.drafts)
        for window, memory, held in zip(self.windows, self.window_memory, seq.held, strict=True):
            first = max(0, item.start - window + 1)
            assert first // size >= held.forgotten
            for position in range(first, item.start + item.num_tokens):
                content = memory[held.blocks[position // size] * size + position % size]
                assert content == (seq.salt, tuple(tokens[: position + 1]))

    def commit(self, item: Scheduled, guess: list[bool]) -> None:
        super().commit(item, guess)
        for window, held in zip(self.windows, item.seq.held, strict=False):
            assert len(held.live) <= -(-(window - 1) // self.block_size) + 2 + len(item.seq.tokens)
        self.scheduler.copy_states(self.copy)

    def teardown(self) -> None:
        super().teardown()
        assert all(kind.pool.usage == 0 for kind in self.scheduler.kinds.all)


class Windows(Kinds):
    windows, slots, block_size, num_blocks = (1, 5), 0, 3, 8


class OnlyStates(Kinds):
    windows, slots, num_blocks, every = (), 3, 30, 2


class States(Kinds):
    """Long prompts in common, and room for checkpoints."""

    windows, slots, num_blocks, block_size, budget = (), 8, 40, 1, 4


class KindsOfClients(Kinds):
    clients, num_blocks, max_num_seqs, slots = ("a", "b", "c"), 20, 4, 6


class NotCached(Kinds):
    caching = False


class Stored(OnDisk, Kinds):
    """Reads of every kind from disk."""

    num_blocks, spare, slots = 20, 8, 9

    def memories(self) -> list[dict[int, Content]]:
        """The last one has states."""
        return [self.memory, *self.window_memory, self.states]


CASES = settings(COMMON, max_examples=40)
TestKinds = Kinds.TestCase
TestKinds.settings = CASES
TestWindows = Windows.TestCase
TestWindows.settings = CASES
TestOnlyStates = OnlyStates.TestCase
TestOnlyStates.settings = CASES
TestStates = States.TestCase
TestStates.settings = CASES
TestKindsOfClients = KindsOfClients.TestCase
TestKindsOfClients.settings = CASES
TestNotCached = NotCached.TestCase
TestNotCached.settings = settings(COMMON, max_examples=20)
TestStoredKinds = Stored.TestCase
TestStoredKinds.settings = CASES


def scheduler_of(window: int | None, slots: int, every: int = 16, **options: int) -> Scheduler:
    forms = {} if window is None else {window: range(200)}
    return Scheduler(
        200, 4, max_num_seqs=4, max_num_batched_tokens=options.get("budget", 64), windows=forms,
        slots=range(slots), every=every,
    )  # fmt: skip


def compute(scheduler: Scheduler, seq: Sequence, output: int = 1) -> list[tuple[int, int]]:
    """Run a sequence to its end; (start, count) of its steps."""
    scheduler.add(seq)
    steps = []
    while seq.num_output < output:
        plan = scheduler.schedule()
        steps += [(item.start, item.count) for item in plan]
        run(scheduler, plan)
    scheduler.finish(seq)
    scheduler.check()
    return steps


@pytest.mark.parametrize(("window", "slots"), [(7, 0), (None, 8), (7, 8)])
def test_the_next_turn_continues_where_the_last_one_ended(window: int | None, slots: int) -> None:
    scheduler = scheduler_of(window, slots)
    first = sequence(0, list(range(50)), output=8)
    compute(scheduler, first, output=8)
    steps = compute(scheduler, sequence(1, [*first.tokens, 5, 6, 7]))
    assert steps[0][0] == len(first.tokens) - 1, "only the last sampled token was not computed"


@pytest.mark.parametrize(("window", "slots"), [(7, 0), (None, 8), (7, 8)])
def test_an_edited_turn_continues_at_a_checkpoint(window: int | None, slots: int) -> None:
    """Another answer after the same prompt, and another end of a prompt."""
    scheduler = scheduler_of(window, slots)
    prompt = list(range(50))
    compute(scheduler, sequence(0, prompt, output=20), output=20)
    assert compute(scheduler, sequence(1, prompt))[0][0] == 48, "the prompt's last edge"
    assert compute(scheduler, sequence(2, [*prompt[:40], *[99] * 9]))[0][0] == 32, "every 16 tokens"


def test_a_prompt_is_cut_at_checkpoints_only_where_there_is_a_state() -> None:
    prompt = list(range(41))
    assert compute(scheduler_of(7, 0), sequence(0, prompt)) == [(0, 41)]
    assert compute(scheduler_of(7, 8), sequence(0, prompt)) == [(0, 16), (16, 16), (32, 8), (40, 1)]


def test_a_window_gives_its_blocks_back() -> None:
    scheduler = scheduler_of(7, 0, budget=8)
    seq = sequence(0, list(range(90)), output=9)
    scheduler.add(seq)
    held = []
    while seq.num_output < 9:
        run(scheduler, scheduler.schedule())
        held.append(len(seq.held[0].live))
    assert max(held) <= 2 + 2 + 2 and len(seq.blocks) >= 24


def test_a_rejected_draft_is_computed_again_from_the_state_before_it() -> None:
    scheduler = scheduler_of(None, 4)
    seq = sequence(0, [1, 2, 3], output=20)
    scheduler.add(seq)
    run(scheduler, scheduler.schedule())
    seq.drafts, before = [9, 9, 9], seq.slot
    (item,) = scheduler.schedule()
    copies: list[tuple[int, int]] = []
    scheduler.copy_states(copies.extend)
    assert not copies, "the step writes another slot than it continues"
    assert seq.backup == before != seq.slot
    scheduler.commit(item, [9, 5])  # one draft was right
    assert seq.slot == before and seq.tokens[-3:] == [9, 9, 5]
    (item,) = scheduler.schedule()
    assert (item.start, item.count, item.decode, item.drafts) == (3, 3, True, ())
    scheduler.commit(item, [7])
    assert seq.num_pending == 1 and not seq.redo
    scheduler.check()


def test_without_a_free_slot_there_are_no_drafts() -> None:
    scheduler = scheduler_of(None, 4)
    seqs = [sequence(i, [i], output=9) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    run(scheduler, scheduler.schedule())
    for seq in seqs:
        seq.drafts = [1]
    assert [item.drafts for item in scheduler.schedule()] == [()] * 4


def test_too_few_blocks_or_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="a window of 9: got 3 blocks; expected"):
        Scheduler(8, 4, 2, 8, windows={9: range(3)})
    with pytest.raises(ValueError, match="states: got 1 slots; expected max_num_seqs = 2"):
        Scheduler(8, 4, 2, 8, slots=[0])
