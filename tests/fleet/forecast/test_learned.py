"""Learned forecasters: their trial on recorded loads, and no resident torch without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from farthing_fleet.forecast.history import FEATURES, History
from farthing_fleet.forecast.learned import GRID_S, make, trial, trials, walk
from farthing_fleet.rehearsal import Settings, made_up_day

MINUTES = np.concatenate([10.0 * made_up_day(GRID_S, seed) for seed in (1, 2)])


class Knows:
    """Forecasts from loads that it was given; `blind` is what it says instead."""

    def __init__(self, loads: np.ndarray, blind: float | None = None) -> None:
        self.loads, self.blind, self.fitted = loads, blind, [0]

    def fit(self, loads: np.ndarray) -> None:
        self.fitted.append(len(loads))

    def plans(self, loads: np.ndarray, count: int) -> np.ndarray:
        assert len(loads) - count == self.fitted[-1]  # trained on what was known
        at = np.arange(len(loads) - count, len(loads))
        made = np.array([self.loads[i : i + 12].max() for i in at])
        return made if self.blind is None else np.full(count, self.blind)


def test_admits_who_knows_the_future_and_nobody_who_repeats_a_number() -> None:
    settings = Settings(15.0, 600.0)
    knows = trial("knows", Knows(MINUTES), MINUTES, settings, 1.0)
    assert knows.admitted and knows.saved > 0.03
    assert not trial("blind", Knows(MINUTES, 40.0), MINUTES, settings, 1.0).admitted


def test_no_trial_without_three_days() -> None:
    points = [(60.0 * minute, 5.0) for minute in range(3 * 1440)]
    assert trials(("lstm",), points, Settings(15.0, 600.0), 1.0) == []


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


def test_trials_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    task = {"names": [], "points": [], "settings": {"step_s": 15.0, "cold_start_s": 600.0}}
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**task, "capacity": 1.0, "prophet": {}}))
    command = [sys.executable, "-m", "farthing_fleet.forecast.learned", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_controller_imports_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, farthing_fleet.estimates, farthing_fleet.controller\n"
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
