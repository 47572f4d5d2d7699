"""The scaling rule: up immediately, down by the rule, never on missing data or clock jumps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.config import PolicyConfig, SloConfig
from farthing_fleet.decision_log import sentence
from farthing_fleet.forecast.base import Forecast
from farthing_fleet.policy import Policy
from farthing_fleet.types import PolicyState, Snapshot

CONFIG = PolicyConfig(capacity=1.0, rule="published")


def seen(time: float, current: int, rate: float | None, **more: object) -> Snapshot:
    fields: dict[str, object] = {"ready": current, "backlog": 0.0, "queue_time_s": 0.0, **more}
    return Snapshot(time=time, current=current, request_rate=rate, **fields)  # type: ignore[arg-type]


def flat(now: float, p50: float, p90: float) -> Forecast:
    return Forecast(now, 700.0, (p50,), (p90,), "lstm", 0.2)


def test_required_is_ceil_of_load_over_utilization_and_capacity() -> None:
    decision = Policy(CONFIG).decide(0, seen(0, 1, 7.0))
    assert (decision.target, decision.action, decision.decided_by) == (10, "up", "realtime")


def test_exact_division_needs_no_extra_replica() -> None:
    assert Policy(CONFIG).decide(0, seen(0, 1, 2.1)).target == 3


@pytest.mark.parametrize(
    ("rate", "target"), [(4.3, 10), (4.2, 10), (4.1, 6 if 6 < 0.6 * 10 else 10), (3.5, 5)]
)
def test_scales_down_only_below_60_percent_of_current(rate: float, target: int) -> None:
    assert Policy(CONFIG).decide(0, seen(0, 10, rate)).target == target


def test_largest_level_decides_and_is_named_in_the_reason() -> None:
    mid = Forecast(0, 600, (3.0, 14.0), (4.0, 15.0), "prophet")
    decision = Policy(CONFIG).decide(0, seen(0, 2, 2.0), flat(0, 5, 7), mid)
    assert decision.levels.short == 10
    assert decision.levels.mid == 20
    assert decision.levels.realtime == 3
    assert (decision.decided_by, decision.target) == ("mid", 20)
    assert "prophet" in decision.reason


def test_mid_level_covers_one_cold_start_and_one_interval() -> None:
    plan = Forecast(0, 100, (1.0, 1.0, 7.0), (1.0, 1.0, 7.0), "prophet")
    near = Policy(replace(CONFIG, cold_start_s=100)).decide(0, seen(0, 2, 1.0), None, plan)
    far = Policy(replace(CONFIG, cold_start_s=300)).decide(0, seen(0, 2, 1.0), None, plan)
    assert (near.levels.mid, far.levels.mid) == (2, 10)


def test_measured_cold_start_takes_precedence() -> None:
    plan = Forecast(0, 100, (1.0, 1.0, 7.0), (1.0, 1.0, 7.0), "prophet")
    measured = seen(0, 2, 1.0, cold_start_s=300.0)
    assert Policy(replace(CONFIG, cold_start_s=10)).decide(0, measured, None, plan).levels.mid == 10


def test_latency_breach_scales_by_the_factor_once_per_cold_start() -> None:
    policy, current, targets = Policy(CONFIG), 10, []
    for now in range(0, 700, 15):
        decision = policy.decide(now, seen(now, current, 5.0, queue_time_s=0.5, ready=10))
        current = decision.target
        targets.append(current)
    assert targets[0] == targets[1] == 10
    assert targets[2] == 15  # 30 s of breach
    assert set(targets[2:42]) == {15}  # no second step within the cold start


def test_next_step_of_a_lasting_breach_is_one_cold_start_after_the_first() -> None:
    policy, current, targets = Policy(replace(CONFIG, latency_of="current")), 10, []
    for now in range(0, 660, 15):
        current = policy.decide(now, seen(now, current, 5.0, queue_time_s=0.5)).target
        targets.append(current)
    assert targets[(30 + 600) // 15 - 1 :][:2] == [15, 23]


@pytest.mark.parametrize(("of", "steps"), [("current", [15, 23]), ("ready", [18, 18])])
def test_breaches_within_one_cold_start_do_not_compound(of: str, steps: list[int]) -> None:
    """Ten requested, twelve serving (two draining); the breach is intermittent for two cold starts."""
    policy, current, targets = Policy(replace(CONFIG, latency_of=of)), 10, []
    for now in range(0, 1200, 15):
        latency = 0.1 if now % 120 == 0 else 0.5
        current = policy.decide(now, seen(now, current, 5.0, queue_time_s=latency, ready=12)).target
        targets.append(current)
    first = targets.index(steps[0])
    assert set(targets[first : first + 600 // 15]) == {steps[0]}
    assert max(targets) == steps[1]  # the next step came after the cold start


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


def test_metric_threshold_and_factor_are_configurable() -> None:
    config = replace(
        CONFIG, latency_metric="ttft", latency_threshold_s=1.0, latency_for_s=0.0, latency_factor=2.0
    )
    assert Policy(config).decide(0, seen(0, 10, 6.0, ttft_s=0.9)).target == 10
    assert Policy(config).decide(0, seen(0, 10, 6.0, ttft_s=1.1)).target == 20


def test_backlog_adds_replicas_to_process_it() -> None:
    config = replace(CONFIG, cold_start_s=30.0, drain_s=60.0)
    assert Policy(config).decide(0, seen(0, 10, 6.0, backlog=600.0)).target == 16


@pytest.mark.parametrize(("rule", "drain_s", "target"), [("published", 60, 11), ("published", 500, 9)])
def test_published_drains_a_backlog_within_a_cold_start_at_full_utilization(
    rule: str, drain_s: float, target: int
) -> None:
    """A backlog of 1500 within 300 s is 5/s besides the load of 6/s; a longer `drain_s` takes precedence."""
    config = replace(CONFIG, rule=rule, cold_start_s=300.0, drain_s=drain_s)
    assert Policy(config).decide(0, seen(0, 5, 6.0, backlog=1500.0)).target == target


def test_other_rules_drain_a_backlog_at_the_target_utilization() -> None:
    config = replace(CONFIG, rule="stabilized", cold_start_s=300.0, drain_s=60.0)
    assert Policy(config).decide(0, seen(0, 5, 6.0, backlog=600.0)).target == 23  # (6 + 10) / 0.7


def test_backlog_counts_in_units_of_the_load() -> None:
    """60 requests of 200 tokens each, within a minute, are 200 tokens/s besides the 1000/s."""
    config = replace(CONFIG, rule="stabilized", unit="output_tokens", capacity=100.0)
    signals = seen(0, 10, 5.0, output_token_rate=1000.0, backlog=60.0)
    assert Policy(config).decide(0, signals).target == 18  # (1000 + 200) / (0.7 * 100)
    assert Policy(config).decide(0, replace(signals, request_rate=0.0)).target == 15


def test_stabilized_scales_down_to_the_largest_need_of_five_minutes() -> None:
    policy, current, history = Policy(CONFIG.with_rule("stabilized")), 10, []
    for now in range(0, 1000, 15):
        rate = 7.0 if now < 400 else 5.6
        current = policy.decide(now, seen(now, current, rate)).target
        history.append((now, current))
    fell = next(now for now, n in history if n < 10)
    assert history[-1][1] == 8
    assert fell == 390 + 300 + 15  # the last decision with the need, the window, and one interval


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
    decision = Policy(CONFIG).decide(0, snapshot, flat(0, 0.1, 0.1), current=10)
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
    policy = Policy(CONFIG.with_rule("stabilized"))
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


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_jump_restarts_the_timer_of_a_breach(jump: float) -> None:
    """Neither is the jump a lasting breach, nor does a breach wait for the clock to catch up."""
    policy = Policy(CONFIG)
    policy.decide(0, seen(0, 10, 6.0, queue_time_s=0.0))
    assert policy.decide(15, seen(15, 10, 6.0, queue_time_s=0.5)).target == 10
    times = [15 + jump + t for t in (0, 15, 30)]
    assert [policy.decide(t, seen(t, 10, 6.0, queue_time_s=0.5)).target for t in times] == [10, 10, 15]


def test_after_the_clock_went_back_no_earlier_time_holds_replicas() -> None:
    """A cool-down and a step of the latency rule end as long after the jump as they would have lasted."""
    policy = Policy(replace(CONFIG, cooldown_s=60.0))
    for now in range(7200, 7290, 15):
        decision = policy.decide(now, seen(now, 10, 6.0, queue_time_s=0.5))
    assert decision.target == 15
    soon = policy.decide(0, seen(0, 15, 1.0))
    assert soon.target == 15 and "clock" in soon.alarms[0]
    later = [policy.decide(t, seen(t, 15, 1.0)).target for t in range(15, 615, 15)]
    assert (set(later[:-1]), later[-1]) == ({15}, 2)


def test_no_lateness_is_excused_by_what_was_planned_before_a_clock_jump() -> None:
    """Neither by plans, nor by an excuse that would last until the clock catches up."""
    config = PolicyConfig(capacity=1.0, cold_start_s=300.0)
    for excused, jump in ((False, 200), (True, -3600)):
        policy = Policy(config)
        for now in range(7200, 9000, 15):
            policy.decide(now, seen(now, 2, 1.0, late_share=0.0))
        if excused:
            assert policy.decide(9000, seen(9000, 2, 9.0, late_share=1.0)).inputs["excused_s"] > 0
        before = policy.utilization
        for now in range(9000 + jump, 9045 + jump, 15):
            decision = policy.decide(now, seen(now, 2, 9.0, late_share=1.0))
        assert decision.inputs["excused_s"] == 0 and policy.utilization < before


def test_a_long_interval_between_decisions_is_no_clock_jump() -> None:
    policy = Policy(replace(CONFIG, interval_s=60.0))
    assert [policy.decide(t, seen(t, 10, 6.0)).alarms for t in (0, 60, 300)] == [()] * 3
    assert policy.decide(541, seen(541, 10, 6.0)).alarms == (
        "clock: +241 s since the last decision; windows restart",
    )


def test_after_a_clock_jump_the_window_is_that_of_the_measured_cold_start() -> None:
    policy = Policy(replace(CONFIG.with_rule("stabilized"), cold_start_s=60.0))
    for now in range(0, 600, 15):
        policy.decide(now, seen(now, 10, 7.0, cold_start_s=600.0))
    low = [policy.decide(t, seen(t, 10, 2.0, cold_start_s=600.0)).target for t in range(900, 1215, 15)]
    assert (set(low[:20]), low[20]) == ({10}, 3)


def test_limits_step_and_cooldown() -> None:
    limited = replace(CONFIG, min_replicas=2, max_replicas=12, max_step=4)
    assert Policy(limited).decide(0, seen(0, 5, 70.0)).target == 9
    assert Policy(limited).decide(0, seen(0, 11, 70.0)).target == 12
    assert Policy(limited).decide(0, seen(0, 3, 0.0)).target == 3 - 1
    assert Policy(limited).decide(0, seen(0, 11, 0.0)).target == 11 - 4
    policy = Policy(replace(CONFIG, cooldown_s=60.0))
    for now in range(0, 75, 15):
        policy.decide(now, seen(now, 5, 3.0))
    assert policy.decide(75, seen(75, 5, 7.0)).target == 10
    assert policy.decide(120, seen(120, 10, 1.0)).decided_by == "cooldown"
    assert policy.decide(150, seen(150, 10, 1.0)).target == 2


def test_failing_forecast_raises_an_alarm() -> None:
    note = "lstm replaced by last-value: running skill -0.10"
    short = Forecast(0, 700, (5.0,), (6.0,), "last-value", -0.1, note)
    assert any(note in alarm for alarm in Policy(CONFIG).decide(0, seen(0, 5, 3.0), short).alarms)


def test_state_round_trips_through_json() -> None:
    policy = Policy(CONFIG.with_rule("stabilized"))
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
        ("max_replicas", 0),
        ("levels", ()),
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


@pytest.mark.parametrize(("rate", "target"), [(15.4, 20), (15.5, 23), (13.0, 20), (12.7, 20), (12.6, 18)])
def test_small_changes_are_tolerated(rate: float, target: int) -> None:
    policy = Policy(replace(CONFIG, rule="slo", stabilization_s=0.0))
    decision = policy.decide(0, seen(0, 20, rate))
    assert decision.target == target
    assert "within 1.1 × 20" in decision.reason or rate != 15.4
    spot = policy.decide(0, seen(0, 20, 13.9, leaving=1))  # 20 needed, one is lost
    assert spot.target == 21


@pytest.mark.parametrize(
    ("current", "rate", "target"),
    [(3, 2.3, 3), (3, 2.32, 4), (3, 1.34, 3), (3, 1.32, 2), (1, 0.76, 1), (1, 0.78, 2), (0, 0.1, 1)],
)
def test_small_fleets_tolerate_fractions_of_a_replica(current: int, rate: float, target: int) -> None:
    """3 replicas until more than 3.3 or, with 5 % to spare, at most 2 are needed."""
    policy = Policy(replace(CONFIG, rule="slo", stabilization_s=0.0, min_replicas=0))
    decision = policy.decide(0, seen(0, current, rate))
    assert decision.target == target
    if target == current:
        assert decision.decided_by == "tolerance"


def test_replicas_with_a_preemption_notice_are_replaced_early() -> None:
    decision = Policy(CONFIG).decide(0, replace(seen(0, 10, 7.0), leaving=2))
    assert decision.target == 12
    assert "replaces 2 announced losses" in decision.reason


@pytest.mark.parametrize(("unit", "target"), [("prompt_tokens", 10), ("output_tokens", 3)])
def test_pools_scale_by_their_own_tokens(unit: str, target: int) -> None:
    config = replace(CONFIG, unit=unit, capacity=1000.0, latency_metric="tpot")
    signals = replace(seen(0, 1, 5.0), prompt_token_rate=7000.0, output_token_rate=2100.0, tpot_s=0.01)
    assert Policy(config).decide(0, signals).target == target


def test_slo_lowers_the_utilization_on_late_requests_and_raises_it_again() -> None:
    policy = Policy(PolicyConfig(capacity=1.0))
    policy.decide(0, replace(seen(0, 10, 7.0), late_share=0.0))
    for now in range(15, 615, 15):
        policy.decide(now, replace(seen(now, 10, 7.0), late_share=1.0))
    low = policy.utilization
    assert low == pytest.approx(0.7 * 0.86, rel=0.01)
    decision = policy.decide(615, replace(seen(615, 10, 7.0), late_share=0.0))
    assert decision.target == 12 and decision.inputs["utilization"] == pytest.approx(low, rel=0.01)
    for now in range(630, 630 + 4 * 86400, 60):
        policy.decide(now, replace(seen(now, 10, 7.0), late_share=0.0))
    assert policy.utilization > 0.7
    fixed = Policy(PolicyConfig(capacity=1.0, rule="stabilized"))
    for now in range(0, 600, 15):
        fixed.decide(now, replace(seen(now, 10, 7.0), late_share=1.0))
    assert fixed.utilization == 0.7


def test_slo_spends_two_fifths_of_the_error_budget() -> None:
    """With 0.2 % of the requests late, of 0.5 % allowed, the utilization stays."""
    moved = {late: SloConfig().moved(0.7, late, 60) for late in (0.0019, 0.002, 0.0021)}
    assert moved[0.002] == pytest.approx(0.7, rel=1e-9)
    assert moved[0.0019] > moved[0.002] > moved[0.0021]


def test_lateness_within_a_cold_start_of_a_jump_does_not_count() -> None:
    policy, used = Policy(PolicyConfig(capacity=1.0, cold_start_s=300.0)), []
    for now in range(0, 7200, 15):
        load, late = (1.0, 0.0) if now < 3600 else (9.0, 1.0)
        policy.decide(now, replace(seen(now, 2, load), late_share=late))
        used.append(policy.utilization)
    jump = 3600 // 15
    excused = (2 * 300 + 2 * 15 + 60) // 15  # while it is a jump, for a cold start and the drain after it
    assert used[jump + excused - 1] == used[jump] >= used[0] == 0.7  # no evidence: it does not rise either
    assert used[-1] < 0.7
    again = PolicyState.from_json(policy.state.to_json())
    assert again == policy.state


@pytest.mark.parametrize(
    ("least", "load", "counts"), [(1, 1.9, True), (1, 2.1, False), (4, 3.9, True), (4, 4.1, False)]
)
def test_a_jump_exceeds_what_the_lowest_utilization_or_the_minimum_could_serve(
    least: int, load: float, counts: bool
) -> None:
    """A plan of 1.0 is at least two replicas at the lowest utilization, 0.5."""
    policy = Policy(PolicyConfig(capacity=1.0, cold_start_s=300.0, min_replicas=least))
    for now in range(0, 3600, 15):
        policy.decide(now, seen(now, 4, 1.0, late_share=0.0))
    before = policy.utilization
    for now in range(3600, 3660, 15):
        policy.decide(now, seen(now, 4, load, late_share=1.0))
    assert (policy.utilization < before) == counts


@pytest.mark.parametrize(("late", "bound"), [(1.0, 0.5), (0.0, 0.9)])
def test_slo_keeps_the_utilization_within_its_bounds(late: float, bound: float) -> None:
    assert SloConfig().moved(bound, late, 60) == bound
    assert SloConfig().moved(0.7, late, 1e9) == bound


def test_lateness_over_a_gap_does_not_move_the_utilization_at_once() -> None:
    policy = Policy(PolicyConfig(capacity=1.0))
    for now in (0, 15, 3615):
        before = policy.utilization
        policy.decide(now, seen(now, 10, 7.0, late_share=1.0))
    assert policy.utilization == before < 0.7


def test_a_few_late_requests_lower_the_utilization_although_the_mean_is_low() -> None:
    policy = Policy(PolicyConfig(capacity=1.0))
    for now in range(0, 3600, 15):
        policy.decide(now, seen(now, 10, 5.0, ttft_s=0.8, late_share=0.02))
    assert policy.utilization < 0.7
    policy = Policy(PolicyConfig(capacity=1.0, slo=SloConfig(tpot_s=0.05)))
    for now in range(0, 600, 15):
        policy.decide(now, seen(now, 10, 5.0, ttft_s=0.8, late_share=0.0, tpot_s=0.06))
    assert policy.utilization == pytest.approx(0.7 * 0.86, rel=0.02)


def test_implausible_cold_starts_are_capped_with_an_alarm() -> None:
    """One pod whose readiness flapped must not hold a breach's replicas for a day."""
    policy, current = Policy(PolicyConfig(capacity=1.0)), 20
    for now in range(0, 3600, 15):
        signals = seen(
            now, current, 10.0, queue_time_s=0.5 if 600 <= now < 660 else 0.0, cold_start_s=86400.0
        )
        decision = policy.decide(now, signals)
        current = decision.target
    assert current == 15
    assert decision.alarms == ("cold start: measured 86400 s, counted as 1800 s",)


def test_reason_says_what_a_forecast_covers() -> None:
    short = Forecast(0, 615.0, (10.0,), (12.0,), "lstm")
    fits, late = (
        Policy(CONFIG).decide(0, seen(0, 18, 1.0, cold_start_s=s), short).reason for s in (600.0, 1200.0)
    )
    assert "within 615 s, needs 18" in fits
    assert "within 615 s of the 1215 s to plan for, needs 18" in late


def test_reason_says_that_lateness_does_not_count() -> None:
    policy = Policy(PolicyConfig(capacity=1.0, cold_start_s=300.0))
    for now in range(0, 3615, 15):
        load, late = (1.0, 0.0) if now < 3600 else (9.0, 1.0)
        decision = policy.decide(now, seen(now, 2, load, late_share=late))
    assert "lateness after a jump does not count for another 375 s" in decision.reason
    assert decision.inputs["excused_s"] == 375


def test_explanation_names_the_input_that_decided() -> None:
    """31 requests/s needed 23 replicas, and the reason was a backlog of 3."""
    config = PolicyConfig(capacity=2.0, target_utilization=0.7, max_replicas=100)
    load = Policy(config).decide(0, seen(0, 20, 31.0, backlog=3.0))
    assert load.target == 23 and sentence(load) == (
        "Goes from 20 to 23 replicas: load is 31 requests/s, which needs 23."
    )
    backlog = Policy(config).decide(0, seen(0, 20, 31.0, backlog=900.0))
    assert backlog.target > 23
    assert sentence(backlog) == (
        f"Goes from 20 to {backlog.target} replicas: backlog of 900 requests to process in 60 s besides "
        f"the load of 31 requests/s (needs 23), which needs {backlog.target}."
    )
