"""The scheduler: random runs against a model of memory, and single decisions."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import IntegrityError, Missed, Scheduled, Sequence, Status

from .scheduler_machine import COMMON, SALTS, Bounds, SchedulerMachine


class NoCaching(SchedulerMachine):
    caching = False


class Sharing(SchedulerMachine):
    """Every prefix in progress is worth waiting for."""

    num_blocks = 30

    def __init__(self) -> None:
        super().__init__()
        self.scheduler.worth_sharing = 1


class Clients(SchedulerMachine):
    clients = ("a", "b", "c")


class ManyClients(SchedulerMachine):
    clients, num_blocks, max_num_seqs = ("a", "b", "c", "d", "e"), 20, 4


class Lookahead(SchedulerMachine):
    lookahead, block_size, num_blocks, budget = 2, 3, 6, 3


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = COMMON
TestNoCaching = NoCaching.TestCase
TestNoCaching.settings = settings(COMMON, max_examples=40)
TestClients = Clients.TestCase
TestClients.settings = COMMON
TestManyClients = ManyClients.TestCase
TestManyClients.settings = COMMON
TestLookahead = Lookahead.TestCase
TestLookahead.settings = settings(COMMON, max_examples=40)
TestSharing = Sharing.TestCase
TestSharing.settings = settings(COMMON, max_examples=40)


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=6),
    budget=st.integers(6, 24),
    salts=st.lists(st.sampled_from(SALTS), min_size=6, max_size=6),
)
def test_concurrent_prompts_compute_a_shared_prefix_once(
    prompts: list[list[int]], budget: int, salts: list[str]
) -> None:
    scheduler = Scheduler(64, 2, max_num_seqs=6, max_num_batched_tokens=budget)
    scheduler.worth_sharing = 2
    for number, (prompt, salt) in enumerate(zip(prompts, salts, strict=False)):
        scheduler.add(sequence(number, prompt, output=1, salt=salt))
    computed: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for _ in range(sum(map(len, prompts)) + len(prompts)):
        plan = scheduler.schedule()
        for item in plan:
            seq, shareable = item.seq, (item.seq.num_prompt - 1) // 2 * 2
            for position in range(item.start, min(item.start + item.count, shareable)):
                computed[seq.salt, tuple(seq.tokens[: position // 2 * 2 + 2])] += position % 2
        run(scheduler, plan)
        for item in plan:
            if item.sample:
                scheduler.finish(item.seq)
        scheduler.check()
    assert scheduler.idle
    assert all(times == 1 for times in computed.values())


def test_layers_of_cancelled_prompts_are_settled_where_nothing_else_lives() -> None:
    """Found by `TestManyClients`, whose end did not take the step that settles them."""
    machine = ManyClients()
    machine.pace(together=None, divided=4)
    for prompt in ([0], [0], [0] * 7):
        machine.add(prompt, 2, 0, "", read_cache=True, client=0, scored=False)
    machine.step([False])
    machine.step([], wait=True)
    assert machine.divided
    while machine.live:
        machine.scheduler.finish(machine.live.pop())
    machine.teardown()


def sequence(
    number: int, prompt: list[int], output: int = 4, order: float | None = None, salt: str = ""
) -> Sequence:
    when = float(number) if order is None else order
    return Sequence(number, list(prompt), len(prompt), len(prompt) + output, when, salt)


def run(scheduler: Scheduler, plan: list[Scheduled]) -> None:
    for item in plan:
        scheduler.commit(item, [9] if item.sample else [])


def test_why_prompt_tokens_are_computed() -> None:
    scheduler = Scheduler(8, 4, max_num_seqs=2, max_num_batched_tokens=40)
    numbers = itertools.count()

    def why(prompt: list[int], cached: int, salt: str = "") -> Missed | None:
        seq = sequence(next(numbers), prompt, output=1, salt=salt)
        scheduler.add(seq)
        run(scheduler, scheduler.schedule())
        scheduler.finish(seq)
        assert seq.num_cached == cached
        return seq.missed

    first = list(range(14))  # three blocks, and a tail of two tokens
    assert why(first, 0) == Missed(new=14)
    assert why([*first, *range(50, 55)], 14) == Missed(new=5)
    edited = [*range(8), 99, *range(9, 14)]
    assert why(edited, 8) == Missed(diverged=6)
    assert why([*edited[:8], 98, *range(30, 44)], 8) == Missed(new=9, diverged=6)
    assert why(first, 0, "other") == Missed(new=14)
    why(list(range(100, 131)), 0)  # evicts everything
    assert why(first, 0) == Missed(diverged=2, evicted=12)  # less than a block may have continued otherwise


def test_decode_is_scheduled_before_prefill() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=4, max_num_batched_tokens=8)
    early, late = sequence(0, [1, 2]), sequence(1, list(range(20)))
    scheduler.add(early)
    run(scheduler, scheduler.schedule())
    scheduler.add(late)
    plan = scheduler.schedule()
    assert [(i.seq, i.count, i.decode) for i in plan] == [(early, 1, True), (late, 7, False)]


def test_drafts_leave_half_of_the_spare_budget_to_prompts() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=2, max_num_batched_tokens=12)
    early = sequence(0, [1, 2], output=20)
    scheduler.add(early)
    run(scheduler, scheduler.schedule())
    early.drafts = [3] * 9
    assert [(i.count, len(i.drafts)) for i in scheduler.schedule()] == [(1, 9)]
    early.max_len = len(early.tokens) + 3  # two accepted drafts and one more token
    assert [(i.count, len(i.drafts)) for i in scheduler.schedule()] == [(1, 2)]
    early.max_len += 20
    scheduler.add(sequence(1, list(range(20))))
    assert [(i.count, len(i.drafts)) for i in scheduler.schedule()] == [(1, 5), (6, 0)]


def test_a_prompt_leaves_a_block_to_those_that_decode() -> None:
    scheduler = Scheduler(4, 4, max_num_seqs=2, max_num_batched_tokens=32)
    early, late = sequence(0, [1, 2], output=2), sequence(1, list(range(12)), output=1)
    scheduler.add(early)
    run(scheduler, scheduler.schedule())
    scheduler.add(late)  # needs all of the three free blocks
    assert [i.seq for i in scheduler.schedule()] == [early]
    scheduler.finish(early)
    assert [i.seq for i in scheduler.schedule()] == [late]


def test_every_second_step_beside_a_divided_prompt_is_without_prompts() -> None:
    scheduler = Scheduler(64, 4, max_num_seqs=4, max_num_batched_tokens=32, limits=Bounds(4, 8))
    scheduler.add(sequence(0, [1], output=9))
    run(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(20))))
    assert [(i.seq.id, i.seq.busy) for i in scheduler.schedule()] == [(0, False), (1, True)]
    for number in (2, 3):
        scheduler.add(sequence(number, [number] * 4))
    steps = []
    for _ in range(3):
        plan = scheduler.schedule()
        steps.append([i.seq.id for i in plan])
        run(scheduler, plan)
    assert steps == [[0, 2], [0, 2], [0, 2, 3]]


def test_a_prefix_is_forgotten_from_its_end() -> None:
    scheduler = Scheduler(4, 4, max_num_seqs=1, max_num_batched_tokens=32)
    first, other = sequence(0, list(range(12)), output=1), sequence(1, [20] * 8, output=0)
    for seq in (first, other):
        scheduler.add(seq)
        run(scheduler, scheduler.schedule())
        scheduler.finish(seq)
    again = sequence(2, [*range(12), 7], output=1)
    scheduler.add(again)
    scheduler.schedule()
    assert again.num_cached == 8  # `other` took the free block, and the last of the three


def test_long_prompt_is_chunked_and_sampled_once() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=1, max_num_batched_tokens=8)
    scheduler.add(sequence(0, list(range(20))))
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        chunks += [(i.start, i.count, i.sample) for i in plan]
        run(scheduler, plan)
    assert chunks == [(0, 8, False), (8, 8, False), (16, 4, True)]


def test_cached_prefix_is_not_recomputed_except_its_last_token() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=4, max_num_batched_tokens=64)
    prompt = list(range(12))
    scheduler.add(sequence(0, prompt))
    run(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, prompt))
    hit = next(i for i in scheduler.schedule() if i.seq.id == 1)
    # Three full blocks are cached; the last one must be recomputed for its logits.
    assert (hit.start, hit.count) == (8, 4)
    assert hit.seq.num_cached == 8


def test_second_turn_reuses_the_first_answer() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=4, max_num_batched_tokens=64)
    first = sequence(0, list(range(6)), output=6)
    scheduler.add(first)
    while first.num_output < 6:
        run(scheduler, scheduler.schedule())
    scheduler.finish(first)
    second = sequence(1, [*first.tokens, 1, 2, 3])
    scheduler.add(second)
    scheduler.schedule()
    assert second.num_cached == 11  # of 12 tokens: two full blocks, and a third that the second takes over
    scheduler.check()


def test_a_tail_is_for_the_same_tokens_and_salt_and_for_one_sequence() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=8, max_num_batched_tokens=64)
    scheduler.worth_sharing = 64
    first = sequence(0, [1, 2, 3, 4, 5, 6], output=2)
    scheduler.add(first)
    while first.num_output < 2:
        run(scheduler, scheduler.schedule())
    scheduler.finish(first)
    (tail,) = scheduler.prefix.check()
    asked = [
        sequence(1, [1, 2, 3, 4, 5, 7, 7, 7]),
        sequence(2, [*first.tokens, 1], salt="b"),
        sequence(3, [*first.tokens, 1]),
        sequence(4, [*first.tokens, 1]),
    ]
    asked[0].read_cache = False
    for seq in asked:
        scheduler.add(seq)
    scheduler.schedule()
    assert [seq.num_cached for seq in asked] == [0, 0, 7, 4]
    assert asked[2].blocks[1] == tail and not scheduler.prefix.check()
    scheduler.check()


def test_the_latest_tail_after_a_prefix_is_kept_until_its_block_is_reused() -> None:
    scheduler = Scheduler(3, 4, max_num_seqs=1, max_num_batched_tokens=64)
    for number, last in enumerate([7, 8]):
        seq = sequence(number, [1, 2, 3, 4, last], output=1)
        scheduler.add(seq)
        run(scheduler, scheduler.schedule())
        scheduler.finish(seq)
        scheduler.check()
    assert len(list(scheduler.prefix.check())) == 1
    repeated = sequence(2, [1, 2, 3, 4, 8, 9])
    scheduler.add(repeated)
    scheduler.schedule()
    assert repeated.num_cached == 5
    scheduler.finish(repeated)
    scheduler.add(sequence(3, [5] * 12, output=0))
    scheduler.schedule()
    assert not scheduler.prefix.check()
    scheduler.check()


def test_different_salt_has_no_cache_hits() -> None:
    scheduler = Scheduler(32, 4, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add(sequence(0, list(range(12)), salt="a"))
    run(scheduler, scheduler.schedule())
    other = sequence(1, list(range(12)), salt="b")
    scheduler.add(other)
    scheduler.schedule()
    assert other.num_cached == 0


def test_least_urgent_is_preempted() -> None:
    scheduler = Scheduler(4, 2, max_num_seqs=2, max_num_batched_tokens=16)
    urgent, other = sequence(0, [1, 2, 3], order=1.0), sequence(1, [4, 5, 6], order=0.5)
    for seq in (urgent, other):
        seq.max_len = 8
        scheduler._watermark = 0
        scheduler.add(seq)
    for _ in range(2):
        run(scheduler, scheduler.schedule())
    run(scheduler, scheduler.schedule())
    assert urgent.status is Status.WAITING and urgent.blocks == [] and urgent.preemptions == 1
    assert other.status is Status.RUNNING
    assert scheduler.num_preemptions == 1


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = Scheduler(6, 2, max_num_seqs=2, max_num_batched_tokens=16)
    scheduler._watermark = 0
    first, last, between = sequence(0, [1] * 6), sequence(2, [2] * 5), sequence(1, [3])
    for seq in (first, last):
        scheduler.add(seq)
    run(scheduler, scheduler.schedule())
    scheduler.add(between)
    plan = scheduler.schedule()  # `first` takes one of the three blocks of `last`; its row is free now
    assert [i.seq for i in plan] == [first] and last.status is Status.WAITING
    run(scheduler, plan)
    assert [i.seq for i in scheduler.schedule()] == [first, between]


def test_no_client_overtakes_the_next_one_that_does_not_fit() -> None:
    scheduler = Scheduler(6, 4, max_num_seqs=4, max_num_batched_tokens=32)
    seqs = [sequence(0, [1] * 6), sequence(1, [2] * 17, output=1), sequence(2, [3])]
    for seq, client in zip(seqs, "abc", strict=True):
        seq.client = client
        scheduler.add(seq)
        if client == "c":
            scheduler.shares.charge("c", 5)  # it has been served more than b
        plan = scheduler.schedule()
        assert [item.seq for item in plan] == seqs[:1]
        run(scheduler, plan)


def test_priority_orders_the_queue_and_waiting_outweighs_it() -> None:
    scheduler = Scheduler(8, 4, max_num_seqs=1, max_num_batched_tokens=8)
    for seq in (sequence(0, [1], order=10.0), sequence(1, [1], order=5.0), sequence(2, [1], order=7.0)):
        scheduler.add(seq)
    assert [s.id for s in scheduler.waiting] == [1, 2, 0]


def test_too_small_budget_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens: got 3"):
        Scheduler(8, 4, max_num_seqs=4, max_num_batched_tokens=3)


def test_sequence_larger_than_the_cache_is_rejected() -> None:
    scheduler = Scheduler(2, 4, max_num_seqs=1, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match="at most 8"):
        scheduler.add(sequence(0, [1] * 8, output=1))


def test_leak_is_detected() -> None:
    scheduler = Scheduler(8, 4, max_num_seqs=1, max_num_batched_tokens=8)
    scheduler.add(sequence(0, [1]))
    scheduler.schedule()
    scheduler.pool.allocate(1)
    with pytest.raises(IntegrityError, match="its owners hold 0"):
        scheduler.check()
