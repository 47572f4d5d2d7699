"""The rule `published`: its utilizations, and its step while the latency is too high."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.config import PolicyConfig
from farthing_fleet.policy import Policy
from farthing_fleet.types import Snapshot

CONFIG = PolicyConfig(capacity=1.0, rule="published")


def seen(time: float, current: int, rate: float, **more: object) -> Snapshot:
    fields: dict[str, object] = {"ready": current, "backlog": 0.0, "queue_time_s": 0.0, **more}
    return Snapshot(time=time, current=current, request_rate=rate, **fields)  # type: ignore[arg-type]


def settled(config: PolicyConfig = CONFIG) -> Policy:
    """A policy that may scale down from 1000 s on."""
    policy = Policy(config)
    for now in range(0, 1000, 15):
        policy.decide(now, seen(now, 10, 6.5))
    return policy


@given(st.integers(1, 50), st.floats(0, 60))
def test_up_above_seven_tenths_and_down_below_six(current: int, rate: float) -> None:
    target = settled().decide(1000, seen(1000, current, rate)).target
    used = rate / current
    assert target == (current if 0.6 <= used <= 0.7 else max(1, math.ceil(rate / 0.7 - 1e-9)))


def test_a_plan_and_a_backlog_change_nothing() -> None:
    assert settled().decide(1000, seen(1000, 10, 6.5, backlog=900.0)).target == 10


def test_latency_steps_by_half_once_per_cold_start() -> None:
    policy, current, targets = Policy(CONFIG), 10, []
    for now in range(0, 700, 15):
        current = policy.decide(now, seen(now, current, 5.0, queue_time_s=0.5, ready=10)).target
        targets.append(current)
    assert targets[0] == targets[1] == 10
    assert targets[2] == 15  # 30 s of breach
    assert set(targets[2:42]) == {15}  # no second step within the cold start


def test_next_step_of_a_lasting_breach_is_one_cold_start_after_the_first() -> None:
    policy, current, targets = Policy(CONFIG), 10, []
    for now in range(0, 660, 15):
        current = policy.decide(now, seen(now, current, 5.0, queue_time_s=0.5)).target
        targets.append(current)
    assert targets[(30 + 600) // 15 - 1 :][:2] == [15, 23]


def test_breaches_within_one_cold_start_do_not_compound() -> None:
    """Ten requested, twelve serving (two draining); the breach is intermittent for two cold starts."""
    policy, current, targets = Policy(CONFIG), 10, []
    for now in range(0, 1200, 15):
        latency = 0.1 if now % 120 == 0 else 0.5
        current = policy.decide(now, seen(now, current, 7.0, queue_time_s=latency, ready=12)).target
        targets.append(current)
    first = targets.index(18)
    assert set(targets[first : first + 600 // 15]) == {18}
    assert max(targets) == 18  # the next step is of the ready replicas, too


def test_interrupted_breach_restarts_its_timer() -> None:
    policy = Policy(CONFIG)
    for now, latency in ((0, 0.5), (15, 0.1), (30, 0.5), (45, 0.5)):
        assert policy.decide(now, seen(now, 10, 6.0, queue_time_s=latency)).target == 10
    assert policy.decide(60, seen(60, 10, 6.0, queue_time_s=0.5)).target == 15


def test_missing_signals_restart_the_timer_of_a_breach() -> None:
    policy, late = Policy(CONFIG), {"queue_time_s": 0.5}
    policy.decide(0, seen(0, 10, 6.0, **late))
    policy.decide(15, None, current=10)
    targets = [policy.decide(t, seen(t, 10, 6.0, **late)).target for t in (30, 45, 60)]
    assert targets == [10, 10, 15]


def test_metric_and_threshold_are_configurable() -> None:
    config = replace(CONFIG, latency_metric="ttft", latency_threshold_s=1.0)
    for latency, target in ((0.9, 10), (1.1, 15)):
        policy = Policy(config)
        policy.decide(0, seen(0, 10, 6.5, ttft_s=latency))
        assert policy.decide(30, seen(30, 10, 6.5, ttft_s=latency)).target == target


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_jump_restarts_the_timer_of_a_breach(jump: float) -> None:
    """Neither is the jump a lasting breach, nor does a breach wait for the clock to catch up."""
    policy = Policy(CONFIG)
    policy.decide(0, seen(0, 10, 6.0, queue_time_s=0.0))
    assert policy.decide(15, seen(15, 10, 6.0, queue_time_s=0.5)).target == 10
    times = [15 + jump + t for t in (0, 15, 30)]
    assert [policy.decide(t, seen(t, 10, 6.0, queue_time_s=0.5)).target for t in times] == [10, 10, 15]


def test_a_step_ends_a_cold_start_after_the_clock_went_back() -> None:
    policy = Policy(CONFIG)
    for now in range(7200, 7290, 15):
        decision = policy.decide(now, seen(now, 10, 6.5, queue_time_s=0.5))
    assert decision.target == 15
    later = [policy.decide(t, seen(t, 15, 1.0)).target for t in range(0, 630, 15)]
    assert (later[0], later[-1]) == (15, 2)
