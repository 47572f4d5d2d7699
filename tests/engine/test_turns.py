"""Clients take turns, use few places, and are charged for CPU time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from farthing.engine.sandbox.turns import WorkQueue
from farthing.shares import Busy


@dataclass
class Task:
    name: str
    size: int = 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(turns: WorkQueue[Task]) -> str:
    turn = turns.take()
    assert turn is not None
    return turn[1].name


def test_clients_take_turns() -> None:
    turns: WorkQueue[Task] = WorkQueue(places=8, places_each=8, credit=1.0, refill=0.0)
    for name in ("a1", "a2", "a3", "b1"):
        turns.put(name[0], Task(name))
    order = []
    for _ in range(4):
        order.append(take(turns))
        turns.done(order[-1][0], 0.0)
    assert order == ["a1", "b1", "a2", "a3"]


def test_last_place_is_reserved_for_a_client_without_any() -> None:
    turns: WorkQueue[Task] = WorkQueue(places=3, places_each=3, credit=1.0, refill=0.0)
    for name in ("a1", "a2", "a3", "a4"):
        turns.put("a", Task(name))
    assert [take(turns), take(turns)] == ["a1", "a2"]
    assert turns._choose() is None
    turns.put("b", Task("b1"))
    assert take(turns) == "b1"


def test_client_without_credit_comes_last_and_gets_one_place() -> None:
    clock = Clock()
    turns: WorkQueue[Task] = WorkQueue(places=4, places_each=2, credit=1.0, refill=0.1, clock=clock)
    turns.put("a", Task("a0"))
    assert turns.take() == ("a", Task("a0"), True)
    turns.done("a", 2.0)
    for name in ("a1", "a2", "b1", "b2"):
        turns.put(name[0], Task(name))
    assert [take(turns), take(turns), take(turns)] == ["b1", "b2", "a1"]
    assert turns._choose() is None  # a uses its one place
    turns.done("a", 0.0)
    clock.now = 20.0
    assert turns.take() == ("a", Task("a2"), True)  # the credit is refilled


def test_abandoned_work_is_a_debt() -> None:
    clock = Clock()
    turns: WorkQueue[Task] = WorkQueue(places=4, places_each=2, credit=2.0, refill=0.5, clock=clock)
    for name in ("a0", "a1", "a2", "a3"):
        turns.put("a", Task(name))
    for seconds in (1.0, 2.0):  # as much as the credit may be abandoned
        take(turns)
        turns.done("a", seconds, abandoned=True)
    turns.put("b", Task("b1"))
    assert take(turns) == "b1"
    assert turns._choose() is None  # although places are free, and the client would have one without credit
    wait = turns._next_paid()
    assert wait is not None and wait == pytest.approx(2.0, abs=0.1)
    clock.now = 1.9
    assert turns._choose() is None
    clock.now = 2.1
    assert take(turns) == "a2"
    turns.done("a", 9.0)  # work that was waited for is none
    assert take(turns) == "a3"


def test_client_in_debt_is_served_as_soon_as_it_has_paid() -> None:
    turns: WorkQueue[Task] = WorkQueue(places=2, places_each=1, credit=1.0, refill=10.0)
    turns.put("a", Task("a0"))
    take(turns)
    turns.done("a", 1.5, abandoned=True)
    turns.put("a", Task("a1"))
    assert take(turns) == "a1"  # without another event


def test_queue_per_client_is_bounded() -> None:
    turns: WorkQueue[Task] = WorkQueue(2, 1, 1.0, 0.0, max_waiting=3, max_bytes=100)
    turns.put("a", Task("large", 1000))  # a single job may have any size
    with pytest.raises(Busy, match="1000 bytes"):
        turns.put("a", Task("small"))
    for i in range(3):
        turns.put("b", Task(f"b{i}"))
    with pytest.raises(Busy, match="3 inputs of this key"):
        turns.put("b", Task("b3"))
    turns.put("c", Task("c0"))


def test_closed_queue_returns_waiting_jobs_and_ends_every_thread() -> None:
    turns: WorkQueue[Task] = WorkQueue(2, 1, 1.0, 0.0)
    turns.put("a", Task("a1"))
    assert turns.close() == [Task("a1")]
    assert turns.take() is None
    turns.done("a", 1.0)
    with pytest.raises(RuntimeError, match="closed"):
        turns.put("a", Task("a2"))


def test_clients_without_debt_are_forgotten() -> None:
    clock = Clock()
    turns: WorkQueue[Task] = WorkQueue(2, 1, 1.0, 1.0, clock=clock)
    for i in range(100):
        turns.put(f"c{i}", Task("x"))
        take(turns)
        turns.done(f"c{i}", 1.0)
        clock.now += 0.1
    assert len(turns._work._accounts) < 20
    assert not turns._waiting and not turns._running
