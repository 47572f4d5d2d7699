"""Plans from the recent past: running figures, the growth within a lead, and the time of day."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing_fleet.forecast.recent import PLANS, Highest, Mean, RecentPlans, _Days, _Hours

values = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(values, st.integers(1, 20))
def test_running_figures_equal_those_of_the_window(loads: list[float], steps: int) -> None:
    highest, mean = Highest(steps), Mean(steps)
    for at, load in enumerate(loads):
        window = loads[max(0, at + 1 - steps) : at + 1]
        assert highest.add(load) == max(window)
        assert mean.add(load) == pytest.approx(np.mean(window), rel=1e-9, abs=1e-3)


@given(values, st.sampled_from([25.0, 135.0, 615.0]))
def test_plans_are_finite_and_never_negative(loads: list[float], lead: float) -> None:
    plans = RecentPlans(15.0, lead)
    for load in loads:
        made = plans.add(load)
        assert len(made) == len(PLANS)
        assert all(np.isfinite(plan) and plan >= 0 for plan in made)


def test_figures_of_earlier_hours_and_days_are_there_from_the_first_step() -> None:
    assert [each.add(7.0) for each in (_Hours(15.0, 60.0), _Days(15.0, 60.0))] == [7.0, 1.0]


def test_growth_covers_nine_in_ten_peaks_of_the_next_lead() -> None:
    random = np.random.default_rng(0)
    loads = np.repeat(10 * np.exp(np.cumsum(random.normal(0, 0.05, 600)) * 0.5), 40)
    plans, lead = RecentPlans(15.0, 600.0), 40
    made = np.array([plans.add(float(load))[1] for load in loads])
    peaks = np.array([loads[at + 1 : at + 1 + lead].max() for at in range(len(loads) - lead - 1)])
    covered = (made[: len(peaks)] >= peaks)[8000:].mean()
    assert 0.85 < covered < 0.97


def test_the_day_plan_knows_a_rise_that_comes_every_day() -> None:
    plans, at_rise = RecentPlans(60.0, 600.0), 0.0
    for minute in range(2 * 1440):
        day = plans.add(30.0 if minute % 1440 >= 720 else 10.0)[2]
        if minute == 1440 + 715:
            at_rise = day
    assert at_rise > 25.0


def test_the_hour_plan_knows_batches_that_a_clock_starts() -> None:
    plans, hours = RecentPlans(10.0, 130.0), []
    for step in range(6 * 360):
        hours.append(plans.add(50.0 if 1800 <= step * 10 % 3600 < 2280 else 5.0)[3])
    last = np.array(hours[-360:])
    assert last[: 180 - 30].max() == 5.0, "nothing is held between batches"
    assert last[180 - 10] == 50.0, "a lead before the batch it is planned for"
    assert last[180 + 30] == 50.0, "and while it runs"


def test_a_batch_that_came_once_is_not_expected_again() -> None:
    plans = RecentPlans(10.0, 130.0)
    made = [plans.add(50.0 if 5 * 360 <= step < 5 * 360 + 48 else 5.0)[3] for step in range(7 * 360)]
    assert max(made[6 * 360 - 30 :]) == 5.0


@given(st.lists(st.floats(0, 1e4), max_size=60), st.integers(1, 20))
def test_a_load_that_ended_leaves_nothing(loads: list[float], steps: int) -> None:
    """A residue of 1e-8 requests/s kept a replica for ever."""
    mean = Mean(steps)
    for load in [*loads, *[0.0] * (2 * steps)]:
        mean.add(load)
    assert mean.value == 0
