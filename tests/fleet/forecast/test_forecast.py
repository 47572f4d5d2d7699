"""Forecasters: learn predictable loads, use no future data, keep their coverage, and report failures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from farthing_fleet.forecast import growth
from farthing_fleet.forecast.base import AbsoluteAR, LastValue, Seasonal, Series
from farthing_fleet.forecast.growth import growth_bound, returning, trailing_max, trailing_mean
from farthing_fleet.forecast.members import make
from farthing_fleet.forecast.short import ShortTerm
from farthing_lab.cli.forecast import app
from farthing_lab.replay.backtest import Conformal, backtest, parse_horizon


def daily(days: int = 21, noise: float = 0.02) -> Series:
    """Hourly load with daily and weekly seasons."""
    hours = np.arange(days * 24)
    base = 100 + 40 * np.sin(2 * np.pi * hours / 24) + 20 * (hours // 24 % 7 < 5)
    return Series(0.0, 3600.0, base * np.random.default_rng(0).normal(1, noise, len(hours)), "daily")


def oscillating(steps: int = 600) -> Series:
    """Alternates around a level, so that the last value is always wrong."""
    values = 10 + 3 * (-1.0) ** np.arange(steps) + np.random.default_rng(1).normal(0, 0.3, steps)
    return Series(0.0, 600.0, values, "oscillating")


def test_naive_and_seasonal() -> None:
    values = np.arange(48.0)
    assert LastValue().predict(values, 3).tolist() == [47, 47, 47]
    season = Seasonal()
    season.fit(Series(0, 3600, values))
    assert season.predict(values, 3).tolist() == [24, 25, 26]


def test_autoregression_beats_the_last_value_on_predictable_loads() -> None:
    report = backtest(oscillating(), AbsoluteAR(), 600, progress=lambda text: None)
    assert report["skill_vs_last"] > 70


def test_conformal_keeps_its_coverage_under_drift() -> None:
    random, conformal, covered = np.random.default_rng(0), Conformal(0.9), []
    for step in range(3000):
        truth = np.array([10 * random.normal(1 + step / 10000, 0.05 + step / 30000)])
        point = np.array([10.0])
        bound = conformal.bound(point)
        covered.append(bool(truth <= bound))
        conformal.learn(point, bound, truth)
    assert 0.88 <= np.mean(covered[300:]) <= 0.92
    with pytest.raises(ValueError, match=r"target: got 0.4; expected a number in \[0.5, 1\)"):
        Conformal(0.4)


def test_backtest_report_and_errors() -> None:
    report = backtest(daily(), make("naive"), 3600, progress=lambda text: None)
    assert {"wape", "mape", "coverage", "skill_vs_last", "skill_vs_seasonal", "fit_seconds"} <= set(report)
    assert report["skill_vs_last"] == pytest.approx(0)
    with pytest.raises(ValueError, match="too few to backtest"):
        backtest(daily(2), make("naive"), 30 * 86400)
    with pytest.raises(ValueError, match="expected one of"):
        make("oracle")


def test_skill_against_a_faultless_reference_is_undefined(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    for load in (5.0, 0.0):
        path.write_text("t_s,total_rate_rps\n" + "\n".join(f"{600 * n},{load}" for n in range(200)))
        for model in ("mixture", "ar"):
            result = CliRunner().invoke(app, [str(path), "--model", model, "--json"])
            assert result.exit_code == 0, result.output
            report = json.loads(result.stdout)
            assert report["skill_vs_last"] is None and report["skill_vs_seasonal"] is None
            assert (report["wape"] is None) == (load == 0)
    result = CliRunner().invoke(app, [str(path), "--model", "naive"])
    assert "skill_vs_last undefined (the last value's error is 0, or rounding only)" in result.stdout


def test_skill_against_a_reference_with_rounding_errors_is_undefined() -> None:
    hours = np.arange(24 * 20)
    series = Series(0.0, 3600.0, 1e6 * (2 + np.sin(2 * np.pi * hours / 24)))
    report = backtest(series, LastValue(), 3600.0)
    assert report["skill_vs_last"] == 0
    assert report["skill_vs_seasonal"] is None


def test_horizons() -> None:
    assert [parse_horizon(t) for t in ("10m", "24h", "1d", "90", "30s")] == [600, 86400, 86400, 90, 30]
    with pytest.raises(ValueError, match="10m"):
        parse_horizon("soon")


def test_trailing_windows_match_their_definition() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    for steps in (1, 3, 7, 60):
        tops = [values[max(0, i - steps + 1) : i + 1].max(axis=0) for i in range(50)]
        means = [values[max(0, i - steps + 1) : i + 1].mean(axis=0) for i in range(50)]
        assert np.allclose(trailing_max(values, steps), tops)
        assert np.allclose(trailing_mean(values, steps), means)


@pytest.mark.parametrize(
    ("step_s", "lead_s", "steps"), [(60, 600, 30), (60, 60, 24), (60, 75, 30), (60, 1200, 60), (1, 2, 48)]
)
def test_load_before_a_collapse_is_remembered(
    step_s: float, lead_s: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 3 leads; once a load has returned later than that, for half an hour, at most 24 leads."""
    short = 3 * max(1, round(lead_s / step_s))
    alone = np.concatenate([np.full(60, 10.0), np.zeros(80), np.full(20, 9.0)])[:, None]
    back = returning(alone, step_s, lead_s)[:, 0]
    assert not back[:60].any() and not back[140:].any()
    assert (back[60 : 59 + short] == 10.0).all() and not back[59 + short : 140].any()
    twice = np.concatenate([np.full(60, 10.0), np.zeros(20), np.full(60, 10.0), np.zeros(80)])[:, None]
    back = returning(twice, step_s, lead_s)[:, 0]
    assert (back[140 : 139 + steps] == 10.0).all() and not back[139 + steps :].any()
    monkeypatch.setattr(growth, "MEMORY_SEEN_S", 30.0 * step_s)
    back = returning(twice, step_s, lead_s)[:, 0]
    assert (back[140 : 139 + short] == 10.0).all() and not back[139 + short :].any()
    dip = np.where(np.arange(120) < 60, 10.0, 4.0)[:, None]
    assert not returning(dip, step_s, lead_s).any()


def test_growth_bound_has_its_nominal_coverage() -> None:
    load = np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.02, 5000)))[:, None]
    bound = growth_bound(load, load, 60.0, 600.0, pace=1.0)
    peaks = trailing_max(load, 10)[10:]
    assert 0.86 <= (peaks[2000:] <= bound[:-10][2000:]).mean() <= 0.94
    assert (bound >= load).all()


def test_short_term_handles_gaps_and_clock_jumps() -> None:
    short = ShortTerm()
    for now in (0.0, 30.0, 60.0, 100.0, 4000.0, 50.0, 200.0, 1e9):
        short.observe(now, 3.0)
    short.observe(1e9 + 1, None)
    short.observe(1e9 + 2, float("nan"))
    made = short.forecast(1e9 + 60)
    assert made is not None and made.p50[0] == pytest.approx(3.0, rel=0.3)


def test_cli(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    series = oscillating(300)
    rows = "\n".join(f"{t},{v}" for t, v in zip(series.times, series.values, strict=True))
    path.write_text("t_s,total_rate_rps\n" + rows)
    result = CliRunner().invoke(app, [str(path), "--model", "ar", "--horizon", "10m", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["skill_vs_last"] > 70
    assert CliRunner().invoke(app, [str(path), "--model", "guess"]).exit_code == 2


@pytest.mark.slow
def test_prophet_with_holidays_and_events() -> None:
    pytest.importorskip("prophet")
    from farthing_fleet.forecast.day import ProphetConfig, ProphetForecaster
    from farthing_fleet.forecast.profile import Event

    config = ProphetConfig(country="US", events=(Event("launch", ("1970-01-10",)),))
    p50, p90 = ProphetForecaster(config).fit(daily()).predict(24)
    assert p50.shape == (24,) and (p90 >= p50).all()
    assert np.abs(p50 - daily(22).values[-24:]).mean() < 20
    with pytest.raises(ValueError, match="two days"):
        ProphetForecaster().fit(daily(1))
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        Event("x", ("soon",))
