"""Production estimates: the day plan with its skill, state after a restart, queries to Prometheus."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from farthing.files import read
from farthing_fleet.config import FleetConfig, PolicyConfig
from farthing_fleet.estimates import (
    PLAN_STEP_S,
    DayPlan,
    append_load,
    forecast_settings,
    make_estimates,
    read_loads,
)
from farthing_fleet.forecast.short import ShortTerm
from farthing_fleet.policy import Policy
from farthing_fleet.run import recall
from farthing_fleet.signals_prometheus import PrometheusSource
from farthing_fleet.types import Snapshot

DAY = 86400.0
BEGIN = 20_000 * DAY


def wave(time: float) -> float:
    """A load with a daily season, 5 to 15 requests/s."""
    return 10.0 + 5.0 * math.sin(2 * math.pi * time / DAY)


def config(tmp_path: Path) -> FleetConfig:
    return read(FleetConfig, {"policy": {"capacity": 1.0}, "state": str(tmp_path / "state")})


def filled(days: float) -> tuple[DayPlan, float]:
    plan, time = DayPlan(), BEGIN
    while time < BEGIN + days * DAY:
        plan.observe(time, wave(time))
        time += PLAN_STEP_S
    return plan, time


def test_day_plan_covers_every_interval_of_the_next_day() -> None:
    plan, now = filled(1.9)
    assert plan.refit(now) is False  # two days are needed
    assert plan.forecast(now) is None
    plan, now = filled(3.0)
    assert plan.refit(now) is True
    assert plan.refit(now + 60.0) is False  # once a day
    forecast = plan.forecast(now)
    assert forecast is not None
    assert (len(forecast.p50), forecast.step_s, forecast.source) == (288, 300.0, "prophet")
    assert forecast.start <= now < forecast.start + forecast.step_s
    for index in range(0, 288, 24):
        truth = wave(forecast.start + index * PLAN_STEP_S)
        assert forecast.p50[index] == pytest.approx(truth, rel=0.15)
    assert all(high >= low for low, high in zip(forecast.p50, forecast.p90, strict=True))
    assert plan.forecast(now + 3 * DAY) is None  # after its end


def test_plan_worse_than_the_last_value_is_replaced_with_a_note() -> None:
    plan, now = filled(3.0)
    plan.refit(now)
    for step in range(60):
        plan.observe(now + step * PLAN_STEP_S, wave(now + step * PLAN_STEP_S))
    assert plan.skill is not None and plan.skill > 0.5
    now += 60 * PLAN_STEP_S
    for step in range(280):  # the clock stays at the plan's time
        plan.observe(now + step * PLAN_STEP_S, wave(BEGIN + 3 * DAY))
    forecast = plan.forecast(now + 280 * PLAN_STEP_S)
    assert forecast is not None
    assert forecast.source == "last-value"
    assert "prophet replaced by last-value: running skill -" in forecast.note


def test_restart_restores_the_load(tmp_path: Path) -> None:
    first = make_estimates(config(tmp_path))
    for second in range(0, 600, 5):
        snapshot = Snapshot(time=BEGIN + second, current=2, ready=2, request_rate=7.0)
        first.observe(BEGIN + second, snapshot)
    forecast = first.short(BEGIN + 600)
    assert forecast is not None and forecast.p50[0] == pytest.approx(7.0, rel=0.25)
    second_run = make_estimates(config(tmp_path))
    assert second_run.remembers_until == BEGIN + 480  # the last complete minute
    forecast = second_run.short(BEGIN + 600)
    assert forecast is not None and forecast.p50[0] == pytest.approx(7.0, rel=0.25)


def test_missing_signals_are_ignored(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path))
    for second in range(0, 600, 5):
        for gap in ({"stale": True}, {"ready": None}, {"request_rate": None}):
            signals = {"ready": 2, "request_rate": 0.0, **gap}
            estimates.observe(BEGIN + second, Snapshot(time=BEGIN + second, current=2, **signals))  # type: ignore[arg-type]
    assert estimates.short(BEGIN + 600) is None
    assert estimates.remembers_until is None


@pytest.mark.parametrize("measured", [120.0, 1200.0])
def test_forecasts_cover_the_measured_cold_start(tmp_path: Path, measured: float) -> None:
    """Within 20 %; the level that replaces the first one knows the past loads."""
    estimates = make_estimates(config(tmp_path))

    def ahead(second: int, cold_start_s: float | None) -> float:
        now = BEGIN + second
        estimates.observe(now, Snapshot(now, 2, ready=2, request_rate=7.0, cold_start_s=cold_start_s))
        estimates.maintain(now)
        forecast = estimates.short(now)
        assert forecast is not None and forecast.p50[0] == pytest.approx(7.0, rel=0.25)
        return forecast.end - now

    for second in range(0, 1200, 15):
        estimates.observe(BEGIN + second, Snapshot(BEGIN + second, 2, ready=2, request_rate=7.0))
    assert ahead(1200, None) == 615.0
    assert ahead(1215, 600.0 * 1.1) == 615.0
    assert ahead(1230, measured) == measured + 15.0
    assert ahead(1245, 600.0) == measured + 15.0  # not more often than once an hour
    assert ahead(1245 + 3600, 600.0) == 615.0


def test_a_short_cold_start_forgets_no_load(tmp_path: Path) -> None:
    """Its level keeps fewer hours; a later one reads them again. Loads observed meanwhile are kept."""
    estimates = make_estimates(config(tmp_path))
    for minute in range(3 * 1440):
        append_load(tmp_path / "state" / "load.csv", BEGIN + 60.0 * minute, 7.0)
    estimates = make_estimates(config(tmp_path))
    now = BEGIN + 3 * DAY
    for cold_start_s in (10.0, 600.0):
        estimates.observe(now, Snapshot(now, 2, ready=2, request_rate=7.0, cold_start_s=cold_start_s))
        estimates.maintain(now)
        assert estimates._short.config.lead_s == cold_start_s + 15.0
        now -= 3700.0  # the clock went back
    assert len(estimates._short.known) >= 3 * 1440 - 120


def test_loads_observed_while_the_level_is_replaced_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates = make_estimates(config(tmp_path))
    for second in range(0, 1200, 15):
        estimates.observe(BEGIN + second, Snapshot(BEGIN + second, 2, ready=2, request_rate=7.0))
    advance = ShortTerm._advance

    def slow(self: ShortTerm) -> None:
        advance(self)
        if self is not estimates._short and len(self._steps) == 19:
            for second in range(1215, 2400, 15):
                estimates.observe(BEGIN + second, Snapshot(BEGIN + second, 2, ready=2, request_rate=9.0))

    monkeypatch.setattr(ShortTerm, "_advance", slow)
    first = BEGIN + 1200
    estimates.observe(first, Snapshot(first, 2, ready=2, request_rate=7.0, cold_start_s=1200.0))
    estimates.maintain(first)
    assert [load for _, load in estimates._short.known][-10:] == [9.0] * 10


def test_partial_lines_of_the_load_file_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    append_load(path, 60.0, 2.0)
    append_load(path, 0.0, 1.0)
    path.write_text(path.read_text() + "12")
    assert read_loads(path) == [(0.0, 1.0), (60.0, 2.0)]
    assert read_loads(tmp_path / "none.csv") == []


def test_full_disk_loses_the_load_file_but_not_the_forecast(tmp_path: Path) -> None:
    estimates = make_estimates(config(tmp_path))
    (tmp_path / "state" / "load.csv").symlink_to("/dev/full")
    for second in range(0, 600, 5):
        estimates.observe(BEGIN + second, Snapshot(time=BEGIN + second, current=2, ready=2, request_rate=7.0))
    assert estimates.short(BEGIN + 600) is not None


def test_past_is_read_from_prometheus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    async def history(
        self: PrometheusSource, unit: str, start: float, end: float, step: float
    ) -> list[tuple[float, float]]:
        asked.append((unit, end - start))
        return [(end - 60.0 * k, 3.0) for k in range(30, 0, -1)]

    monkeypatch.setattr(PrometheusSource, "load_history", history)
    fleet, source = config(tmp_path), PrometheusSource("http://127.0.0.1:9")
    asyncio.run(recall(fleet, source, make_estimates(fleet)))
    assert asked == [("requests", pytest.approx(28 * DAY))]
    again = make_estimates(fleet)
    assert again.remembers_until is not None
    asyncio.run(recall(fleet, source, again))
    assert len(asked) == 1  # no gap to fill
    assert len(read_loads(fleet.state / "load.csv")) == 30


def test_forecast_section_is_checked(tmp_path: Path) -> None:
    short, prophet = forecast_settings(
        {
            "short": {"model": "profile", "lstm": {"epochs": 2}},
            "prophet": {"country": "DE", "events": [{"name": "sale", "dates": ["2026-11-27"]}]},
        }
    )
    assert (short.model, short.lstm.epochs) == ("profile", 2)
    assert prophet.country == "DE" and prophet.events[0].dates == ("2026-11-27",)
    with pytest.raises(ValueError, match=r"forecast.arima: unknown field; expected short or prophet"):
        forecast_settings({"arima": {}})
    with pytest.raises(ValueError, match=r"forecast.short.modell: unknown field"):
        forecast_settings({"short": {"modell": "lstm"}})
    with pytest.raises(ValueError, match=r"forecast.short.model: got 'arima'; expected one of mixture, lstm"):
        forecast_settings({"short": {"model": "arima"}})


def test_fleets_of_every_capacity_reach_zero_after_the_traffic_ends(tmp_path: Path) -> None:
    """Within three leads, the window and two minutes of smoothing, by the shipped mixture; and not before."""
    estimates = make_estimates(config(tmp_path))
    policies = {c: Policy(PolicyConfig(capacity=c, min_replicas=0)) for c in (0.3, 1.0, 2.0, 20.0)}
    current, reached = dict.fromkeys(policies, 8), dict[float, float]()
    end = BEGIN + 5400.0
    for tick in range(600):
        now = BEGIN + 15.0 * tick
        load = 2.0 + 0.2 * math.sin(tick) if now < end else 0.0
        seen = Snapshot(now, 8, ready=8, request_rate=load, backlog=0.0, queue_time_s=0.0, late_share=0.0)
        estimates.observe(now, seen)
        short = estimates.short(now)
        for capacity, policy in policies.items():
            decision = policy.decide(now, seen, short, current=current[capacity])
            current[capacity] = decision.target
            if decision.target == 0:
                reached.setdefault(capacity, now - end)
    assert short is not None and (short.p50, short.p90) == ((0.0,), (0.0,))
    assert current == dict.fromkeys(policies, 0)
    assert all(1800 < passed <= 3 * 615 + 300 + 120 for passed in reached.values()), reached
