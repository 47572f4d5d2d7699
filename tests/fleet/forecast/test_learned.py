"""Learned forecasters: rules by name, trained on what was known, and no resident torch without one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.forecast.history import FEATURES, History
from farthing_fleet.forecast.learned import GRID_S, ForecastRule, make, walk
from farthing_fleet.rehearsal import made_up_day

MINUTES = np.concatenate([10.0 * made_up_day(GRID_S, seed) for seed in (1, 2)])


class Knows:
    """Forecasts from loads that it was given."""

    def __init__(self, loads: np.ndarray) -> None:
        self.loads, self.fitted = loads, [0]

    def fit(self, loads: np.ndarray) -> None:
        self.fitted.append(len(loads))

    def plans(self, loads: np.ndarray, count: int) -> np.ndarray:
        assert len(loads) - count == self.fitted[-1]  # trained on what was known
        at = np.arange(len(loads) - count, len(loads))
        return np.array([self.loads[i : i + 12].max() for i in at])


@given(
    st.floats(0, 50),
    st.one_of(st.none(), st.floats(0, 100)),
    st.floats(0.1, 1.0),
    st.sampled_from([1.0, 15.0]),
)
def test_a_chosen_forecaster_is_followed_and_never_below_the_load(
    load: float, expected: float | None, utilization: float, step_s: float
) -> None:
    rule = ForecastRule("lstm", step_s, utilization)
    rule.expect(expected)
    for _ in range(100):
        plan = rule.observe(load)
    assert plan.need == pytest.approx(max(load, expected or 0.0) / utilization, abs=1e-6)
    assert plan.rule.startswith("lstm") and plan.now == pytest.approx(load, abs=1e-6)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farthing_fleet.forecast.learned.find_spec", lambda name: None)
    for name, package in (("lstm", "torch>="), ("prophet", "prophet>=")):
        with pytest.raises(
            ValueError, match=rf"{name} needs .*: pip install .*{package}.*; or choose another rule"
        ):
            make(name, 600.0, 0.0)


def test_unknown_forecasters_are_named() -> None:
    with pytest.raises(ValueError, match="forecaster 'arima': expected one of lstm, regression, prophet"):
        make("arima", 600.0, 0.0)


@pytest.mark.parametrize("name", ["lstm", "regression"])
def test_packaged_forecasters_use_nothing_later(name: str) -> None:
    made = make(name, 600.0, 0.0)
    plans = made.plans(MINUTES[:2000], 100)
    assert plans.shape == (100,) and np.isfinite(plans).all() and (plans > 0).all()
    assert np.allclose(made.plans(MINUTES[:1950], 50), plans[:50], rtol=1e-4)


def test_walk_trains_on_what_was_known() -> None:
    knows = Knows(MINUTES)
    plans = walk(knows, MINUTES)
    assert knows.fitted == [0, 720, 1440, 2160]
    assert np.isnan(plans[:720]).all() and np.isfinite(plans[720:]).all()


def test_features_are_scale_free() -> None:
    one, two = (History(scale * MINUTES[:600], 60.0, 600.0) for scale in (1.0, 100.0))
    assert one.features.shape == (600, FEATURES)
    assert np.allclose(one.features, two.features)
    assert np.allclose(one.target, two.target)


def test_prophet_fits_without_a_word() -> None:
    """It fits twice a day beside the controller's log, and amid a replay's table."""
    code = (
        "import numpy; from farthing_fleet.forecast.prophet import ProphetForecaster;"
        "ProphetForecaster().fit(0.0, 1800.0, 10 + numpy.sin(numpy.arange(96) / 8))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_controller_imports_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, farthing_fleet.estimates, farthing_fleet.controller\n"
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
