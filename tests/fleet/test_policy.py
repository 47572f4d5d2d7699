"""The scaling rule: up immediately, down by the rule, never on missing data or clock jumps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.config import PolicyConfig
from farthing_fleet.decision_log import sentence
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Noise, Plan
from farthing_fleet.types import PolicyState, Snapshot

CONFIG = PolicyConfig(capacity=1.0)


def seen(time: float, current: int, rate: float | None, **more: object) -> Snapshot:
    fields: dict[str, object] = {"ready": current, "backlog": 0.0, "queue_time_s": 0.0, **more}
    return Snapshot(time=time, current=current, request_rate=rate, **fields)  # type: ignore[arg-type]


def planned(need: float, **more: object) -> Plan:
    """A plan at 70 % utilization."""
    return Plan(need, 0.7 * need, 0.6 * need, 1 / 0.7, "highest of 15 min", **more)  # type: ignore[arg-type]


def test_required_is_ceil_of_load_over_utilization_and_capacity() -> None:
    decision = Policy(CONFIG).decide(0, seen(0, 1, 7.0))
    assert (decision.target, decision.action, decision.decided_by) == (10, "up", "short")


def test_exact_division_needs_no_extra_replica() -> None:
    assert Policy(CONFIG).decide(0, seen(0, 1, 2.1)).target == 3


@given(
    st.integers(1, 40),
    st.floats(0, 60),
    st.floats(0, 500),
    st.floats(0, 60),
    st.sampled_from([5.0, 120.0, 600.0]),
)
def test_no_latency_orders_more_than_the_backlog_can_use(
    current: int, rate: float, backlog: float, latency: float, cold_start: float
) -> None:
    """However long it lasts: more replicas than drain the backlog in `drain_s` would idle."""
    config = replace(CONFIG, cold_start_s=cold_start, max_replicas=10_000)
    policy, count = Policy(config), current
    for step in range(20):
        now = step * cold_start
        signals = seen(now, count, rate, backlog=backlog, queue_time_s=latency, ttft_s=latency)
        count = policy.decide(now, signals).target
        assert count <= max(current, math.ceil(rate / 0.7), math.ceil(rate + backlog / config.drain_s)) + 1


def test_backlog_adds_replicas_to_process_it() -> None:
    """6 for the load, and 600 in a minute."""
    config = replace(CONFIG, cold_start_s=30.0, drain_s=60.0)
    assert Policy(config).decide(0, seen(0, 10, 6.0, backlog=600.0)).target == 16


def test_backlog_counts_in_units_of_the_load() -> None:
    """600 requests of 200 tokens each, in tokens of 100/s a replica."""
    config = replace(CONFIG, unit="tokens", capacity=100.0, cold_start_s=45.0)
    signals = seen(0, 10, 5.0, prompt_token_rate=400.0, output_token_rate=600.0, backlog=600.0)
    assert Policy(config).decide(0, signals).target == 30  # 1000/s and 120,000 tokens in 60 s
    assert Policy(config).decide(0, replace(signals, request_rate=0.0)).target == 15


@given(st.integers(1, 30), st.floats(0.1, 20), st.floats(0, 3000), st.integers(0, 30))
def test_no_need_is_ordered_twice(ready: int, rate: float, backlog: float, starting: int) -> None:
    """The answer is a total: the same signals ask for the same replicas, however many are starting."""
    config = replace(CONFIG, cold_start_s=60.0, max_replicas=10_000)
    policy = Policy(config)
    first = policy.decide(0, seen(0, ready, rate, ready=ready, backlog=backlog)).target
    again = policy.decide(15, seen(15, first + starting, rate, ready=ready, backlog=backlog)).target
    assert again == first + starting or again == first


def test_replicas_that_start_for_a_backlog_are_not_cancelled_while_it_lasts() -> None:
    """They were, as soon as they were expected to drain it; then none ever became ready."""
    policy, targets = Policy(replace(CONFIG, cold_start_s=600.0)), [10]
    for now in range(0, 600, 15):
        signals = seen(now, targets[-1], 12.0, ready=10, backlog=2.0 * now)
        targets.append(policy.decide(now, signals).target)
    assert targets == sorted(targets) and targets[-1] >= 30


def test_a_backlog_that_a_spike_left_orders_what_it_is_worth() -> None:
    """One request/s and 4500 requests waiting: 75 more replicas for 20 minutes drained it in a minute."""
    decision = Policy(replace(CONFIG, cold_start_s=1185.0)).decide(0, seen(0, 2, 1.0, backlog=4500.0))
    assert decision.target == 10
    assert "backlog of 4500 requests besides 1 requests/s, needs 10 to process it in 520 s" in decision.reason


def test_a_mean_of_rules_says_so() -> None:
    decision = Policy(CONFIG).decide(0, seen(0, 2, 2.0), replace(planned(9.3), rules=7))
    assert "the mean of 7 rules, led by highest of 15 min, plans for 6.51" in decision.reason


def test_the_plan_decides_and_names_its_rule() -> None:
    decision = Policy(CONFIG).decide(0, seen(0, 2, 2.0), planned(9.3))
    assert (decision.target, decision.decided_by, decision.levels.short) == (10, "short", 10)
    assert "highest of 15 min plans for 6.51 requests/s at 70% utilization, needs 10" in decision.reason
    assert decision.inputs["utilization"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("current", "need", "noise", "target"),
    [
        (10, 9.1, Noise(9.0, 8.9), 10),  # within the noise: stays
        (10, 10.4, Noise(9.8, 9.5), 10),
        (10, 10.4, Noise(10.2, 9.5), 11),  # the load with its noise exceeds the fleet
        (10, 7.0, Noise(6.5, 7.0), 7),  # a replica fewer is more than 20 % above the need
        (10, 94.0, Noise(9.8, 9.5), 94),  # a plan knows of a rise that the load does not show
        (2, 1.0, Noise(0.8, 0.9), 2),
        (1, 0.9, Noise(0.7, 0.9), 1),
    ],
)
def test_noise_of_a_steady_load_changes_nothing(current: int, need: float, noise: Noise, target: int) -> None:
    policy = Policy(CONFIG)
    for now in range(0, 615, 15):
        policy.decide(now, seen(now, current, 1.0), planned(float(current)))
    decision = policy.decide(615, seen(615, current, 1.0), planned(need, steady=noise))
    assert decision.target == target


def test_a_moment_of_backlog_does_not_take_a_replica_from_a_steady_fleet() -> None:
    """The backlog decides with a need below the fleet, as the plan alone would."""
    policy = Policy(CONFIG)
    for now in range(0, 615, 15):
        policy.decide(now, seen(now, 8, 1.0), planned(8.0))
    rate = CONFIG.capacity * 6.96
    snapshot = replace(seen(615, 8, rate), backlog=0.7)
    decision = policy.decide(615, snapshot, planned(6.95, steady=Noise(7.12, 6.95)))
    assert (decision.target, decision.decided_by) == (8, "steady")
    assert decision.reason.startswith("realtime: backlog of 0.7 requests")


def test_scales_down_to_the_plan_after_a_cold_start() -> None:
    policy = Policy(CONFIG)
    targets = [policy.decide(t, seen(t, 10, 1.0), planned(4.2)).target for t in range(0, 630, 15)]
    assert (set(targets[:40]), targets[40]) == ({10}, 5)


@pytest.mark.parametrize(
    "snapshot",
    [
        None,
        seen(0, 10, None),
        seen(0, 10, float("nan")),
        seen(0, 10, 0.1, stale=True),
        seen(-100, 10, 0.1),
        seen(500, 10, 0.1),
    ],
)
def test_missing_or_stale_signals_hold_and_alarm(snapshot: Snapshot | None) -> None:
    decision = Policy(CONFIG).decide(0, snapshot, planned(0.1), current=10)
    assert (decision.target, decision.action) == (10, "hold")
    assert decision.alarms


@pytest.mark.parametrize("gap", [{"queue_time_s": None}, {"backlog": None}, {"ready": None}])
def test_a_missing_latency_signal_allows_up_but_not_down(gap: dict[str, None]) -> None:
    down = Policy(CONFIG).decide(0, seen(0, 10, 0.5, **gap))
    up = Policy(CONFIG).decide(0, seen(0, 10, 14.0, **gap))
    assert (down.target, up.target) == (10, 20)
    assert down.alarms and up.alarms


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_jump_never_scales_down(jump: float) -> None:
    policy = Policy(replace(CONFIG, cold_start_s=300.0))
    for now in range(0, 600, 15):
        policy.decide(now, seen(now, 10, 7.0))
    late = 600 + jump
    first = policy.decide(late, seen(late, 10, 0.7))
    assert first.target == 10
    assert any("clock" in alarm for alarm in first.alarms)
    soon = [policy.decide(late + t, seen(late + t, 10, 0.7)).target for t in range(15, 300, 15)]
    assert set(soon) == {10}
    after = [policy.decide(late + t, seen(late + t, 10, 0.7)).target for t in range(300, 400, 15)]
    assert after[-1] == 1


def test_after_the_clock_went_back_no_earlier_time_holds_replicas() -> None:
    """A cool-down ends as long after the jump as it would have lasted."""
    policy = Policy(replace(CONFIG, cooldown_s=60.0))
    for now in range(7200, 7290, 15):
        decision = policy.decide(now, seen(now, 10, 10.5))
    assert decision.target == 15
    soon = policy.decide(0, seen(0, 15, 1.0))
    assert soon.target == 15 and "clock" in soon.alarms[0]
    later = [policy.decide(t, seen(t, 15, 1.0)).target for t in range(15, 615, 15)]
    assert (set(later[:-1]), later[-1]) == ({15}, 2)


def test_a_long_interval_between_decisions_is_no_clock_jump() -> None:
    policy = Policy(replace(CONFIG, interval_s=60.0))
    assert [policy.decide(t, seen(t, 10, 6.0)).alarms for t in (0, 60, 300)] == [()] * 3
    assert policy.decide(541, seen(541, 10, 6.0)).alarms == (
        "clock: +241 s since the last decision; windows restart",
    )


def test_after_a_clock_jump_the_window_is_that_of_the_measured_cold_start() -> None:
    policy = Policy(replace(CONFIG, cold_start_s=60.0))
    for now in range(0, 600, 15):
        policy.decide(now, seen(now, 10, 7.0, cold_start_s=600.0))
    low = [policy.decide(t, seen(t, 10, 2.0, cold_start_s=600.0)).target for t in range(900, 1515, 15)]
    assert (set(low[:40]), low[40]) == ({10}, 3)


def test_limits_and_cooldown() -> None:
    limited = replace(CONFIG, min_replicas=2, max_replicas=12)
    assert Policy(limited).decide(0, seen(0, 11, 70.0)).target == 12
    for current, target in ((3, 2), (11, 2)):
        policy = Policy(limited)
        for now in range(0, 600, 15):
            assert policy.decide(now, seen(now, current, 0.0)).target == current
        assert policy.decide(600, seen(600, current, 0.0)).target == target
    policy = Policy(replace(CONFIG, cooldown_s=60.0))
    for now in range(0, 675, 15):
        policy.decide(now, seen(now, 5, 3.0))
    assert policy.decide(675, seen(675, 5, 7.0)).target == 10
    assert policy.decide(720, seen(720, 10, 1.0)).decided_by == "cooldown"
    assert policy.decide(750, seen(750, 10, 1.0)).target == 2


def test_state_round_trips_through_json() -> None:
    policy = Policy(replace(CONFIG, cold_start_s=300.0))
    for now in range(0, 120, 15):
        policy.decide(now, seen(now, 10, 7.0 - now / 100, queue_time_s=0.3))
    copy = Policy(policy.config, PolicyState.from_json(policy.state.to_json()))
    now = 120.0
    assert copy.decide(now, seen(now, 10, 1.0)) == policy.decide(now, seen(now, 10, 1.0))
    with pytest.raises(ValueError, match="not a saved policy state"):
        PolicyState.from_json('{"nonsense": 1}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 0),
        ("target_utilization", 1.2),
        ("latency_metric", "e2e"),
        ("rule", "arima"),
        ("max_replicas", 0),
    ],
)
def test_errors_name_the_setting_and_accepted_values(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}.*expected"):
        PolicyConfig(**{"capacity": 1.0, field: value})  # type: ignore[arg-type]


signals = st.one_of(st.none(), st.floats(0, 100), st.just(float("nan")))


@given(
    st.lists(st.tuples(signals, signals, st.floats(0, 2), st.booleans(), st.floats(-50, 200)), max_size=40)
)
def test_never_below_the_need_and_never_down_without_signals(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """For any signals: a usable load is always covered, and unusable signals never remove a replica."""
    policy, current, now = Policy(replace(CONFIG, max_replicas=10_000)), 5, 0.0
    for rate, backlog, latency, stale, elapsed in steps:
        now += elapsed
        snapshot = seen(now, current, rate, backlog=backlog, queue_time_s=latency, stale=stale)
        decision = policy.decide(now, snapshot)
        usable = rate is not None and rate == rate and not stale
        if not usable or backlog is None:
            assert decision.target >= current
        if usable:
            assert decision.target >= rate / 0.7 - 1e-6
        current = decision.target


def test_implausible_cold_starts_are_capped_with_an_alarm() -> None:
    """One pod whose readiness flapped must not hold replicas for a day."""
    policy, current = Policy(PolicyConfig(capacity=1.0)), 20
    for now in range(0, 3600, 15):
        decision = policy.decide(now, seen(now, current, 10.0, cold_start_s=86400.0))
        current = decision.target
    assert current == 15
    assert decision.alarms == ("cold start: measured 86400 s, counted as 1800 s",)


def test_explanation_names_the_input_that_decided() -> None:
    """31 requests/s needed 23 replicas, and the reason was a backlog of 3."""
    config = PolicyConfig(capacity=2.0, target_utilization=0.7, max_replicas=100)
    load = Policy(config).decide(0, seen(0, 20, 31.0, backlog=3.0))
    assert load.target == 23 and sentence(load) == (
        "Goes from 20 to 23 replicas: load is 31 requests/s, which needs 23."
    )
    backlog = Policy(config).decide(0, seen(0, 20, 31.0, backlog=3000.0))
    assert backlog.target > 23 and backlog.decided_by == "realtime"
    assert sentence(backlog).startswith(
        f"Goes from 20 to {backlog.target} replicas: backlog of 3000 requests besides 31 requests/s"
    )


def test_an_older_state_is_read() -> None:
    state = PolicyState.from_json('{"last_time": 1.0, "utilization": 0.6, "history": [[1, 2]]}')
    assert state.last_time == 1.0
