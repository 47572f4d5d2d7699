"""Rehearsed fleets: their queues, the choice of a rule, and a steady load."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_fleet.forecast.recent import PLANS
from farthing_fleet.rehearsal import (
    MARGINS,
    PRICE,
    SHARE_OF_BUDGET,
    SPREAD,
    Fleets,
    Rehearsal,
    Settings,
    Steady,
    drain,
    made_up_day,
)


def test_a_replica_serves_after_it_was_wanted_for_a_cold_start() -> None:
    fleets = Fleets(Settings(15.0, 60.0), np.array([2.0]))
    ready = []
    for need in (2, 5, 5, 5, 5, 5, 3, 3, 5):
        fleets.order(np.array([float(need)]), 1.0)
        ready.append(int(fleets.ready[0]))
    assert ready == [2, 2, 2, 2, 2, 5, 3, 3, 3]  # five after four steps; what was cancelled starts again


def test_late_requests_are_those_that_wait_too_long() -> None:
    """Load 2 on one replica for 15 s: waits grow to 15 s, and those beyond 2 s are late."""
    fleets = Fleets(Settings(15.0, 60.0, drain_s=1e9), np.array([1.0]))
    fleets.serve(2.0)
    late, hours = fleets.settle()
    assert float(late[0]) == pytest.approx(30.0 * 13 / 15)
    assert float(hours[0]) == 1.0
    assert float(fleets.backlog[0]) == 15.0


def test_a_spike_that_passed_orders_less_than_a_jump_that_lasts() -> None:
    """A spike of five minutes at 16 leaves 75 minutes of work for a replica; a cold start takes 20 minutes.

    Draining it in a minute took 75 replicas for 20 minutes each, to serve what was late anyway.
    """
    backlog = np.array([4500.0])
    passed, lasting = (float(drain(np.array([load]), backlog, 60.0, 1200.0)[0]) for load in (1.0, 16.0))
    assert passed == pytest.approx(math.sqrt(20 * 4500 / 1200)) and lasting == pytest.approx(4 * passed)
    assert float(drain(np.array([16.0]), backlog, 60.0, 30.0)[0]) == 75.0  # at most this fast
    assert float(drain(np.array([0.0]), backlog, 60.0, 1200.0)[0]) == 3.75  # it ends without a load, too


def test_rules_share_the_decision_by_their_costs() -> None:
    """The need lies between those of the rules that cost at most a tenth more than the cheapest."""
    rehearsal = Rehearsal(Settings(60.0, 600.0), 10.0)
    for load in 10.0 * made_up_day(60.0, seed=5):
        plan = rehearsal.observe(float(load))
    rehearsal._weigh()
    plan = rehearsal.observe(10.0)
    cost, weights = rehearsal.costs()[0].min(axis=-1), rehearsal._weights
    assert weights.sum() == pytest.approx(1.0) and plan.rules == np.count_nonzero(weights) > 1
    assert ((weights > 0) == (cost < (1 + SPREAD) * cost.min())).all()
    assert weights.argmax() == cost.argmin()
    wanted = (rehearsal._planned * rehearsal._margins)[weights > 0]
    assert wanted.min() <= plan.need <= wanted.max()


def test_late_requests_cost_only_beyond_the_error_budget() -> None:
    rehearsal = Rehearsal(Settings(60.0, 600.0), 10.0)
    rehearsal.observe(1.0)
    budget = SHARE_OF_BUDGET * (1 - rehearsal.settings.target)
    rehearsal._arrived, rehearsal._hours = 100.0, np.full_like(rehearsal._hours, 300.0)
    for share, beyond in ((0.0, 0.0), (budget / 2, 0.0), (budget + 0.01, 0.01)):
        rehearsal._late = np.full_like(rehearsal._late, 100.0 * share)
        assert rehearsal.costs()[0] == pytest.approx(3.0 + PRICE * beyond)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 50), min_size=1, max_size=120),
    st.sampled_from([10.0, 120.0, 600.0]),
    st.integers(0, 3),
)
def test_invariants_of_the_fleets(loads: list[float], cold_start: float, least: int) -> None:
    told = Settings(15.0, cold_start, least=least, most=40)
    rehearsal = Rehearsal(told, loads[0], prior=False)
    for load in loads:
        plan = rehearsal.observe(load)
        fleets = rehearsal._fleets
        assert math.isfinite(plan.need) and plan.need >= 0
        assert (fleets.ready <= fleets.orders).all() and (fleets.orders >= least).all()
        assert (fleets.orders <= 40).all() and (fleets.backlog >= 0).all()
        assert (np.diff(fleets.orders, axis=-1) >= 0).all() or fleets.backlog.any()


def test_constant_load_is_served_at_a_high_utilization() -> None:
    rehearsal = Rehearsal(Settings(15.0, 120.0), 20.0)
    for load in 20.0 * np.random.default_rng(0).gamma(100, 0.01, 5760):
        plan = rehearsal.observe(float(load))
    assert plan.steady is not None and 20 < plan.steady.high < 24
    assert 20 < plan.need < 26 and plan.late < 0.01


def test_a_load_that_returns_every_ten_minutes_is_held_by_a_window() -> None:
    """With a cold start of ten minutes no rule that follows the load serves it."""
    rehearsal = Rehearsal(Settings(15.0, 600.0), 8.0)
    needs = []
    for step in range(3 * 5760):
        needs.append(rehearsal.observe(20.0 if step % 40 < 8 else 4.0).need)
    assert min(needs[-5760:]) >= 16.0


def test_the_growth_at_this_time_of_day_is_ordered_before_it_comes() -> None:
    """A load that quadruples at the same minute of every day, and nothing else."""
    rehearsal = Rehearsal(Settings(60.0, 1200.0), 5.0)
    needs = []
    for minute in range(5 * 1440):
        needs.append(rehearsal.observe(20.0 if 600 <= minute % 1440 < 900 else 5.0).need)
    last = needs[-1440:]
    costs = rehearsal.costs()[0].min(axis=(1, 2))
    assert max(last[:560]) < 20.0 and PLANS[int(costs.argmin())] == "day"


def test_margins_order_fleets_by_size() -> None:
    assert (np.diff(MARGINS) > 0).all()


def test_a_jump_ends_a_steady_load() -> None:
    steady, random = Steady(15.0), np.random.default_rng(1)
    for load in 10 * random.gamma(100, 0.01, 1000):
        assert steady.add(float(load), 12.0) is not None
    assert [steady.add(float(load), 12.0) for load in 20 * random.gamma(100, 0.01, 50)][-1] is None
    for load in 20 * random.gamma(100, 0.01, 200):
        found = steady.add(float(load), 25.0)
    assert found is not None and found.high == pytest.approx(22.4, rel=0.05)


def test_bursts_are_not_called_noise() -> None:
    steady, random = Steady(15.0), np.random.default_rng(2)
    assert [steady.add(float(load), 1.0) for load in random.exponential(10, 1000)][-1] is None
