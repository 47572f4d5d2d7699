"""Fairness between clients: no starvation, shares close to equal, and no delay of new clients by a crowd."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.engine.fairness import Fairness
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence, Status

NUMBERS = itertools.count()


def sequence(client: str, prompt: int, output: int, priority: int = 0) -> Sequence:
    number = next(NUMBERS)
    tokens = [number % 7919 + 1] * prompt  # no prefix shared between sequences
    return Sequence(number, tokens, prompt, prompt + output, number + 10.0 * priority, client=client)


def step(scheduler: Scheduler, served: Counter[str] | None = None) -> list[Scheduled]:
    """Compute one step and remove finished sequences."""
    plan = scheduler.schedule()
    for item in plan:
        scheduler.commit(item, [9] if item.sample else [])
        if served is not None:
            served[item.seq.client] += item.num_tokens
    for item in plan:
        if len(item.seq.tokens) >= item.seq.max_len:
            scheduler.finish(item.seq)
    scheduler.check()
    return plan


def scheduler(rows: int = 8, blocks: int = 256, budget: int = 32) -> Scheduler:
    return Scheduler(blocks, 4, rows, budget, enable_prefix_caching=False)


LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 30))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 12), LENGTHS), min_size=2))
def test_clients_with_work_get_equal_shares(loads: dict[str, tuple[int, tuple[int, int]]]) -> None:
    """Regardless of the number and sizes of their requests."""
    engine, served = scheduler(), Counter[str]()
    for _ in range(150):
        for client, (depth, (prompt, output)) in loads.items():
            mine = sum(seq.client == client for seq in engine.running + engine.waiting)
            # More than a step can finish: a client without sequences counts as gone and returns level.
            for _ in range((depth + 1) * 8 - mine):
                engine.add(sequence(client, prompt, output))
        step(engine, served)
    longest = max(prompt + output for _, (prompt, output) in loads.values())
    assert max(served.values()) - min(served.values()) <= 2 * engine.max_tokens + longest


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(100, 400))
def test_crowd_does_not_delay_a_new_client(lengths: tuple[int, int], crowd: int) -> None:
    engine = scheduler(rows=8, blocks=128, budget=32)
    for _ in range(crowd):
        engine.add(sequence("crowd", *lengths))
    for _ in range(20):
        step(engine)
    newcomer = sequence("newcomer", 20, 5)
    engine.add(newcomer)
    steps = 0
    while newcomer.status is not Status.FINISHED and steps < 50:
        steps += 1
        step(engine)
    assert newcomer.status is Status.FINISHED
    assert steps <= 1 + 5 + 5  # its prompt, its output, and steps shared with the crowd
    while not engine.idle:
        step(engine)


def test_successive_new_clients_are_served() -> None:
    engine = scheduler()
    for _ in range(200):
        engine.add(sequence("crowd", 50, 100))
    for _ in range(10):
        step(engine)
    for _ in range(20):
        newcomer = sequence("newcomer", 10, 3)
        engine.add(newcomer)
        for _ in range(12):
            step(engine)
        assert newcomer.status is Status.FINISHED
    assert any(seq.client == "crowd" for seq in engine.running)


def test_preempted_crowd_still_finishes() -> None:
    engine = scheduler(rows=4, blocks=64)
    crowd = [sequence("crowd", 30, 20) for _ in range(20)]
    for seq in crowd:
        engine.add(seq)
    for round_ in itertools.count():
        if round_ % 3 == 0:
            engine.add(sequence("steady", 5, 2))
        step(engine)
        if all(seq.status is Status.FINISHED for seq in crowd):
            break
        assert round_ < 3000
    assert any(seq.preemptions for seq in crowd)


def test_large_requests_of_two_clients_do_not_preempt_each_other() -> None:
    engine = scheduler(rows=4, blocks=32)  # 128 tokens; each wants 100
    both = [sequence(client, 60, 40) for client in "ab"]
    for seq in both:
        engine.add(seq)
    for _ in range(400):
        step(engine)
    assert all(seq.status is Status.FINISHED for seq in both)
    assert sum(seq.preemptions for seq in both) <= 2


@pytest.mark.parametrize(("prompt", "preempted"), [(24, 2), (25, 0)])
def test_nothing_is_preempted_for_more_blocks_than_a_clients_share(prompt: int, preempted: int) -> None:
    """Of 13 blocks, two clients may each claim six; the crowd holds twelve."""
    engine = scheduler(blocks=13, budget=64)
    for _ in range(3):
        engine.add(sequence("crowd", 14, 2))
    step(engine)
    engine.add(sequence("newcomer", prompt, 1))
    engine.schedule()
    assert engine.num_preemptions == preempted


def test_a_clients_only_sequence_is_not_preempted_for_another_client() -> None:
    """Although it holds 8 of 13 blocks, twice a third, and the newcomer lacks two of its share."""
    engine = scheduler(blocks=13, budget=64)
    for seq in (sequence("first", 6, 2), sequence("large", 30, 2)):
        engine.add(seq)
    step(engine)
    engine.add(sequence("newcomer", 16, 1))
    engine.schedule()
    assert engine.num_preemptions == 0


def test_priority_applies_within_a_client() -> None:
    engine = scheduler(rows=1)
    late, urgent = sequence("a", 4, 1), sequence("a", 4, 1, priority=-5)
    engine.add(late)
    engine.add(urgent)
    assert [item.seq for item in step(engine)] == [urgent]


def test_single_client_is_served_by_urgency() -> None:
    engine = scheduler(rows=4)
    many = [sequence("", 8, 4) for _ in range(8)]
    for seq in many:
        engine.add(seq)
    assert [item.seq for item in step(engine)] == many[:4]


def test_idle_time_earns_no_credit() -> None:
    fair = Fairness()
    fair.enter("busy")
    fair.charge("busy", 1000)
    fair.enter("late")
    assert fair.served("late") == 999  # next in turn, and no more
    fair.leave("late")
    fair.charge("busy", 500)
    fair.enter("late")
    assert fair.served("late") == 1499


def test_disconnecting_keeps_the_debt() -> None:
    fair = Fairness()
    for client in ("modest", "greedy"):
        fair.enter(client)
    fair.charge("greedy", 1000)
    fair.leave("greedy")
    fair.enter("greedy")
    assert fair.served("greedy") == 1000 and fair.served("modest") == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50), st.booleans()), max_size=60))
def test_every_client_with_work_has_a_counter(moves: list[tuple[str, int, bool]]) -> None:
    fair, live = Fairness(), Counter[str]()
    for client, tokens, enters in moves:
        if enters:
            fair.enter(client)
            live[client] += 1
            fair.charge(client, tokens)
        elif live[client]:
            fair.leave(client)
            live[client] -= 1
    assert fair.num_clients == sum(count > 0 for count in live.values())
    assert {client for client in live if live[client]} <= fair._served.keys() <= live.keys()
