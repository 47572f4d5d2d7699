"""Shares of clients: turns by what was charged, limits that refill, and bounded memory."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farthing import shares as module
from farthing.shares import Shares

CLIENTS = st.sampled_from("abcd")
COSTS = st.integers(0, 50)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_idle_time_earns_no_credit() -> None:
    fair = Shares(ahead=1)
    fair.enter("busy")
    fair.charge("busy", 1000)
    fair.enter("late")
    assert fair.served("late") == 999  # next in turn, and no more
    fair.leave("late")
    fair.charge("busy", 500)
    fair.enter("late")
    assert fair.served("late") == 1499


def test_disconnecting_keeps_the_debt() -> None:
    fair = Shares(ahead=1)
    for client in ("modest", "greedy"):
        fair.enter(client)
    fair.charge("greedy", 1000)
    fair.leave("greedy")
    fair.enter("greedy")
    assert fair.served("greedy") == 1000 and fair.served("modest") == 0


@given(st.lists(st.tuples(CLIENTS, COSTS, st.booleans()), max_size=60))
def test_every_client_with_work_has_a_counter(moves: list[tuple[str, int, bool]]) -> None:
    fair, live = Shares(ahead=1), Counter[str]()
    for client, tokens, enters in moves:
        if enters:
            fair.enter(client)
            live[client] += 1
            fair.charge(client, tokens)
        elif live[client]:
            fair.leave(client)
            live[client] -= 1
    present = {client for client in live if live[client]}
    assert fair.present == present and all(fair.work(client) == live[client] for client in "abcd")
    assert present <= fair._accounts.keys() <= live.keys()


@given(st.dictionaries(CLIENTS, st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1))
def test_clients_with_work_are_charged_equally(loads: dict[str, tuple[int, int]]) -> None:
    """However many pieces of work each has, and whatever each piece costs."""
    fair, served = Shares(), Counter[str]()
    left = {client: count for client, (count, _) in loads.items()}
    for client, count in left.items():
        for _ in range(count):
            fair.enter(client)
    while all(left.values()):
        client = fair.next(fair.present)
        cost = loads[client][1]
        fair.charge(client, cost)
        fair.leave(client)
        served[client] += cost
        left[client] -= 1
    assert max(served[c] for c in loads) - min(served[c] for c in loads) <= max(c for _, c in loads.values())


@given(st.lists(st.tuples(CLIENTS, COSTS), max_size=200), st.sampled_from([0, 1]))
def test_no_client_starves(others: list[tuple[str, int]], ahead: int) -> None:
    """Others leave and return at will; one that waits is passed over once by each."""
    fair = Shares(ahead=ahead)
    fair.enter("waits")
    fair.charge("waits", 10)
    passed: dict[str, list[int]] = {client: [] for client in "abcd"}
    for client, cost in others:
        fair.enter(client)
        if fair.next(["waits", client]) == client:
            passed[client].append(max(ahead, cost))
            fair.charge(client, max(ahead, cost))
        fair.leave(client)
    for costs in passed.values():
        assert len(costs) <= 1


class Accounts(RuleBasedStateMachine):
    """A limit that refills, against a bucket per client that never forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.shares = Shares(limit=10.0, refill=2.0, clock=self.clock)
        self.spent = dict.fromkeys("abcd", 0.0)

    @rule(client=CLIENTS, cost=st.integers(0, 30))
    def charge(self, client: str, cost: int) -> None:
        self.shares.charge(client, cost)
        self.spent[client] += cost

    @rule(seconds=st.integers(0, 20))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        self.spent = {client: max(0.0, spent - 2.0 * seconds) for client, spent in self.spent.items()}

    @rule(count=st.integers(1, 40))
    def strangers(self, count: int) -> None:
        """Have debts that are paid by the time more of them come."""
        for number in range(count):
            self.shares.charge(f"{self.clock.now} {number}", 1)

    @rule(client=CLIENTS, cost=st.integers(0, 10))
    def wait_for(self, client: str, cost: int) -> None:
        seconds = self.shares.wait(client, cost)
        self.wait(math.ceil(seconds))  # type: ignore[arg-type]
        assert self.shares.room(client) >= cost

    @invariant()
    def room_is_what_was_not_spent(self) -> None:
        for client, spent in self.spent.items():
            assert self.shares.room(client) == pytest.approx(10.0 - spent)
            assert self.shares.room(client) <= 10.0


class Turns(RuleBasedStateMachine):
    """The next client is the least served one, of equal ones that of the oldest turn."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares()
        self.work = Counter[str]()
        self.order: list[str] = []  # by the last arrival or charge

    def moved(self, client: str) -> None:
        self.order = [other for other in self.order if other != client] + [client]

    @rule(client=CLIENTS)
    def enter(self, client: str) -> None:
        lowest = min((self.shares.served(c) for c in self.shares.present), default=None)
        before = self.shares.served(client)
        self.shares.enter(client)
        if not self.work[client]:
            self.moved(client)
            assert lowest is None or self.shares.served(client) == max(before, lowest)
        self.work[client] += 1

    @precondition(lambda self: self.work.total())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(+self.work)))
        self.shares.leave(client)
        self.work[client] -= 1

    @precondition(lambda self: self.work.total())
    @rule(cost=COSTS)
    def serve(self, cost: int) -> None:
        client = self.shares.next(self.shares.present)
        served = {other: self.shares.served(other) for other in self.shares.present}
        least = [other for other in self.order if other in served and served[other] == min(served.values())]
        assert client == least[0]
        self.shares.charge(client, cost)
        self.moved(client)


TestAccounts = Accounts.TestCase
TestTurns = Turns.TestCase
TestAccounts.settings = TestTurns.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_capacity_is_given_back() -> None:
    held = Shares(limit=3)
    held.charge("a", 3)
    assert held.room("a") == 0 and held.room("b") == 3 and held.wait("a", 1) == math.inf
    held.charge("a", -2)
    assert held.room("a") == 2 and held.wait("a", 1) == 0


def test_millions_of_keys_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one client waits, others come once each and keep a debt: those who owe most are remembered."""
    monkeypatch.setattr(module, "MOST_ABSENT", 64)
    clock = Clock()
    turns, bucket = Shares(), Shares(limit=10.0, refill=1.0, clock=clock)
    turns.enter("waits")
    bucket.charge("worst", 1e6)
    for number in range(5_000):
        name = f"key {number}"
        turns.enter(name)
        turns.charge(name, 1 + number % 7)
        turns.leave(name)
        bucket.charge(name, 1 + number % 7)
        clock.now += 1e-3
    assert len(turns._accounts) <= 2 * 64 and len(bucket._accounts) <= 2 * 64
    turns.enter(name)
    assert turns.next(["waits", name]) == "waits"
    assert bucket.room("worst") < 0


def test_what_clients_still_have_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ABSENT", 16)
    held = Shares(limit=3)
    names = [f"key {number}" for number in range(200)]
    for name in names:
        held.charge(name, 2)
    assert all(held.room(name) == 1 for name in names)
    for name in names:
        held.charge(name, -2)
    held.charge("another", 1)
    assert all(held.room(name) == 3 for name in names)


def test_clients_without_debt_are_forgotten() -> None:
    clock = Clock()
    bucket = Shares(limit=1.0, refill=1.0, clock=clock)
    for number in range(1_000):
        bucket.charge(f"key {number}", 1.0)
        clock.now += 0.1
    assert len(bucket._accounts) < 30
