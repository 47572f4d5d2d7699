"""One client's prompts delay another's decoding by a bounded time, whatever is sent."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from farthing.engine.interference import Interference
from farthing.engine.pace import Pace
from farthing.engine.scheduler import Scheduler
from farthing.engine.sequence import Scheduled, Sequence

NUMBERS = itertools.count()
LIMIT, DECODE, COST = 0.15, 0.01, 1e-3  # seconds: of a step, of a decode-only step, per prompt token


def sequence(client: str, prompt: int, output: int) -> Sequence:
    number = next(NUMBERS)
    return Sequence(number, [number % 7919 + 1] * prompt, prompt, prompt + output, number, client=client)


def decode(client: str) -> Scheduled[Sequence]:
    return Scheduled(sequence(client, 4, 4), 4, 1, (), True, True, False)


def prompt(client: str, tokens: int) -> Scheduled[Sequence]:
    return Scheduled(sequence(client, tokens, 4), 0, tokens, (), True, False, True)


def test_client_pauses_for_as_long_as_it_has_delayed_another() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"a"}) == {"b"}
    owed.observe([decode("a")], 0.04, 0.04)
    assert owed.paused({"a"}) == {"b"}
    owed.observe([decode("a")], 0.04, 0.04)
    assert owed.paused({"a"}) == set()


def test_client_does_not_pause_for_itself_or_without_others() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("a", 100)], 0.1, 0.04)
    owed.observe([prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"a", "b"}) == set()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    assert owed.paused({"b"}) == owed.paused(set()) == set()


def test_debt_is_forgotten_once_no_other_client_decodes() -> None:
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.1, 0.04)
    owed.observe([decode("b")], 0.01, 0.01)
    assert owed.paused({"a"}) == set()


def test_time_spent_on_a_third_client_repays_nothing() -> None:
    """Or two clients could take turns at delaying another."""
    owed = Interference()
    owed.observe([decode("a"), prompt("b", 100)], 0.10, 0.02)
    owed.observe([decode("a"), prompt("c", 100)], 0.10, 0.02)
    assert owed.paused({"a"}) == {"b", "c"}


@pytest.mark.parametrize("attackers", [1, 3])
@pytest.mark.parametrize("length", [8, 300, 4000])
def test_flood_of_prompts_delays_an_answer_by_a_bounded_time(attackers: int, length: int) -> None:
    """A simulated machine; prompts of each attacker wait at all times."""
    pace = Pace(LIMIT)
    scheduler = Scheduler(4096, 16, 64, 512, False, limits=pace)
    clock, spent = 0.0, Counter[str]()

    def step() -> None:
        nonlocal clock
        for i in range(attackers):
            while sum(seq.client == f"bad{i}" for seq in [*scheduler.running, *scheduler.waiting]) < 4:
                scheduler.add(sequence(f"bad{i}", length, 2))
        plan = scheduler.schedule()
        decodes = sum(item.decode for item in plan)
        tokens = sum(item.count for item in plan if not item.decode)
        seconds = DECODE * (decodes > 0) + COST * tokens
        scheduler.interference.observe(plan, seconds, pace.decode_seconds(decodes))
        pace.observe(decodes, tokens, seconds)
        clock += seconds
        spent["prompts"] += int(1e6 * COST * tokens)
        for item in plan:
            scheduler.commit(item, [9] if item.sample else [])
        for item in plan:
            if len(item.seq.tokens) >= item.seq.max_len:
                scheduler.finish(item.seq)
        scheduler.check()

    for _ in range(50):
        step()
    firsts, delays = [], []
    for _ in range(20):
        good = sequence("good", 4, 8)
        scheduler.add(good)
        began = clock
        while good.num_output < 1:
            step()
        firsts.append(clock - began)
        began = clock
        while len(good.tokens) < good.max_len:
            step()
        delays.append(clock - began - 7 * DECODE)
    assert max(firsts) <= LIMIT
    assert max(delays) <= attackers * LIMIT
    assert spent["prompts"] >= 0.4e6 * clock  # and the flood is served
