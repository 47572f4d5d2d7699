"""Weekly profile, calendar, day-ahead blend and floor: odd days do not recur, no future data is used."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_fleet.forecast.base import DAY_S, Series
from farthing_fleet.forecast.day import (
    FLOOR_SHARES,
    ChosenForecast,
    DayForecaster,
    FloorShare,
    best_share,
    floor_losses,
)
from farthing_fleet.forecast.profile import Event, ProfileAR, ProfileConfig, calendar
from farthing_lab.replay.backtest import Backtest, backtest

MONDAY = 4 * DAY_S  # 1970-01-05


def weekly(days: int, noise: float = 0.03, seed: int = 0) -> Series:
    """Hourly load from a Monday, with different weekends."""
    hours = np.arange(days * 24)
    weekend = hours // 24 % 7 >= 5
    shape = 100 + np.where(weekend, 15, 45) * np.sin(2 * np.pi * (hours - np.where(weekend, 9, 6)) / 24)
    return Series(MONDAY, 3600.0, shape * np.random.default_rng(seed).normal(1, noise, len(hours)), "weekly")


def wape(point: np.ndarray, truth: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(100 * np.abs(point - truth).sum() / truth.sum())


def test_odd_day_does_not_recur_a_week_later() -> None:
    series, clean = weekly(57), weekly(57)
    odd = slice(49 * 24, 50 * 24)
    series.values[odd] *= 0.3
    model = ProfileAR()
    model.fit(series.head(56 * 24))
    assert wape(model.predict(series.values[: 56 * 24], 24), clean.values[56 * 24 :]) < 6


def test_todays_departure_is_extrapolated() -> None:
    series = weekly(57, noise=0.01)
    random = np.random.default_rng(1)
    level = np.exp(np.repeat(np.cumsum(random.normal(0, 0.08, 57)), 24))  # a different level every day
    drifting = Series(series.start, series.step_s, series.values * level, "drifting")
    report = backtest(drifting, ProfileAR(), 3600, Backtest(begin=0.8), lambda text: None)
    assert report["wape"] < 2.5
    assert report["skill_vs_seasonal"] > 60


@pytest.mark.parametrize("days", [0.5, 2, 3, 10, 40])
def test_any_length_of_history_gives_a_forecast(days: float) -> None:
    series = weekly(45).head(round(24 * days))
    model = ProfileAR(ProfileConfig(country="US"))
    model.fit(series)
    path = model.predict(series.values, 24)
    assert path.shape == (24,) and np.isfinite(path).all() and (path >= 0).all()
    assert model.ready == (days >= 3)
    if not model.ready:
        assert (path == series.values[-1]).all()


def test_forecast_uses_no_future_data() -> None:
    series = weekly(45)
    origin = 40 * 24 + 5
    changed = series.values.copy()
    changed[origin:] = 1e6
    model = ProfileAR(ProfileConfig(recent=8, neighbors=2, country="US"))
    model.fit(series.head(40 * 24))
    before = model.predict(series.values[:origin], 24)
    assert np.array_equal(before, model.predict(changed[:origin], 24))
    model.fit(Series(series.start, series.step_s, changed).head(40 * 24))
    assert np.array_equal(before, model.predict(changed[:origin], 24))


def test_forecast_beyond_the_reach_is_rejected() -> None:
    series = weekly(30)
    model = ProfileAR()
    with pytest.raises(ValueError, match="at most 9 days beyond it"):
        model.fit(series)
        model.predict(series.values, 10 * 24)


@pytest.mark.filterwarnings("error")
def test_forecasts_further_ahead_than_the_history_teaches_follow_the_profile() -> None:
    series = weekly(3)
    model = ProfileAR()
    model.fit(series)
    made = model.predict(series.values, 9 * 24)  # the history teaches one day ahead
    assert np.isfinite(made).all()
    assert 0.5 * series.values.min() < made.min() and made.max() < 2 * series.values.max()


def test_holidays_use_a_sundays_profile() -> None:
    """Four public holidays on working days look like Sundays; the fifth is forecast as one."""
    begin = (datetime(2014, 5, 5) - datetime(1970, 1, 1)).total_seconds()  # a Monday
    series = Series(begin, 3600.0, weekly(210, noise=0.01).values, "holidays")
    values = series.values.copy()
    marks = calendar(begin, 3600.0, len(series), "US").holiday
    first = sorted({int(step) // 24 for step in np.flatnonzero(marks)})
    assert len(first) >= 5  # Memorial, Independence, Labor, Columbus, Veterans, Thanksgiving day
    for day in first:
        sunday = day - (day % 7 + 1)
        values[day * 24 : day * 24 + 24] = series.values[sunday * 24 : sunday * 24 + 24]
    last = first[-1] * 24
    told, untold = (ProfileAR(ProfileConfig(country=country)) for country in ("US", None))
    errors = []
    for model in (told, untold):
        model.fit(Series(begin, 3600.0, values[:last]))
        errors.append(wape(model.predict(values[:last], 24), values[last : last + 24]))
    assert errors[0] < 0.75 * errors[1]


def test_calendar_marks_holidays_bridges_eves_and_events() -> None:
    begin = (datetime(2014, 11, 24) - datetime(1970, 1, 1)).total_seconds()  # the Monday before Thanksgiving
    made = calendar(begin, DAY_S, 7, "US", (Event("sale", ("2014-11-28",), days_after=1),))
    assert made.weekday.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(made.holiday).tolist() == [3]
    assert np.flatnonzero(made.eve).tolist() == [2]
    assert np.flatnonzero(made.bridge).tolist() == [4]
    assert np.flatnonzero(made.events[0]).tolist() == [4, 5]
    assert np.flatnonzero(made.special).tolist() == [2, 3, 4, 5]
    assert not calendar(begin, DAY_S, 7, None).special.any()
    with pytest.raises(ValueError, match="ISO code"):
        calendar(begin, DAY_S, 7, "Atlantis")


def test_day_forecaster_blends_and_learns_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad Prophet loses its share to the profile from the first forecast on."""
    series, model = weekly(50), DayForecaster()

    def fit(series: Series) -> None:
        model.prophet._end = series.end

    monkeypatch.setattr(model.prophet, "fit", fit)
    monkeypatch.setattr(
        model.prophet, "predict", lambda steps: (np.full(steps, 300.0), np.full(steps, 330.0))
    )
    errors = []
    for day in range(42, 50):
        model.fit(series.head(day * 24))
        p50, p90 = model.quantiles(series.values[: day * 24], 24)
        assert p90 == pytest.approx(1.1 * p50)
        errors.append(wape(p50, series.values[day * 24 : day * 24 + 24]))
    assert max(errors) < 6
    assert model.choice == ChosenForecast("blend", share=0.0)


@pytest.mark.parametrize("best", ["yesterday", "last-week"])
def test_naive_forecast_is_used_where_it_is_better(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    """Every day (or week) repeats only the previous one; bad models are not used."""
    random, period = np.random.default_rng(0), 24 if best == "yesterday" else 7 * 24
    values = np.tile(random.uniform(5, 50, period), 60 * 24 // period)
    series, model = Series(0.0, 3600.0, values, best), DayForecaster()
    monkeypatch.setattr(model.prophet, "fit", lambda series: None)
    monkeypatch.setattr(model.prophet, "predict", lambda steps: (np.full(steps, 90.0), np.full(steps, 99.0)))
    model.profiles = []
    for day in range(40, 46):
        model.fit(series.head(day * 24))
        p50, _ = model.quantiles(series.values[: day * 24], 24)
        assert p50 == pytest.approx(series.values[day * 24 : day * 24 + 24])
        assert model.choice.name == best


loads = st.floats(0.1, 1e4)


@given(st.lists(st.tuples(loads, loads, loads), max_size=20))
@settings(max_examples=50, deadline=None)
def test_floor_never_costs_more_than_the_whole_plan(rows: list[tuple[float, float, float]]) -> None:
    planned, bound, truth = np.array(rows).reshape(-1, 3).T
    losses = floor_losses(planned, bound, truth, 0.7)
    share = best_share(losses)
    assert share in FLOOR_SHARES
    total = losses.sum(axis=0)
    assert total[share == FLOOR_SHARES][0] <= total[-1] * (1 + 1e-9) + 1e-6
    learnt = FloorShare(window=50)
    for row in rows:
        learnt.learn(*row)
    assert learnt.settle() == share


@pytest.mark.parametrize(("quiet", "share"), [(13, 0.7), (14, 0.5)])
def test_a_shortage_costs_ten_times_what_idle_capacity_does(quiet: int, share: float) -> None:
    """One day needs 0.7 of the plan. A tenth less misses 2.86 then, and leaves 2 fewer idle every day."""
    truth = np.array([8.0] * quiet + [20.0])
    assert best_share(floor_losses(np.full(quiet + 1, 20.0), np.full(quiet + 1, 8.0), truth, 0.7)) == share


def test_floor_is_lowered_if_it_only_costs_and_kept_if_it_saves() -> None:
    many = np.ones(50)
    assert (
        best_share(floor_losses(12 * many, 8 * many, 8 * many, 0.7)) == 0.5
    )  # the bound alone is sufficient
    assert best_share(floor_losses(12 * many, 8 * many, 11 * many, 0.7)) == 0.5  # its replicas carry 11.4
    assert best_share(floor_losses(20 * many, 8 * many, 20 * many, 0.7)) == 0.7  # 0.7 of it carries all
    assert (
        best_share(floor_losses(20 * many, 8 * many, 40 * many, 0.7)) == 1.0
    )  # even the whole plan is too low
