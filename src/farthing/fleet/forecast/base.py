"""The forecaster interface, and naive forecasters as baselines."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farthing.fleet.series import DAY_S, Series

Floats = NDArray[np.float64]


class Forecaster(Protocol):
    """Fits on a series occasionally, and forecasts after any later history of the same series.

    `values` [n] of `predict` start where the fitted series started; the result is [steps], not negative.
    """

    name: str

    def fit(self, series: Series) -> None: ...

    def predict(self, values: Floats, steps: int) -> Floats: ...


class LastValue:
    """The last value, repeated."""

    name = "last-value"

    def fit(self, series: Series) -> None:
        """No-op."""

    def predict(self, values: Floats, steps: int) -> Floats:
        return np.full(steps, values[-1])


class Seasonal:
    """The value one period (a day or a week) earlier; the last value if the history is shorter."""

    def __init__(self, period_s: float = DAY_S) -> None:
        self.period_s = period_s
        self.name = "seasonal-day" if period_s == DAY_S else "seasonal-week"
        self._period = 0

    def fit(self, series: Series) -> None:
        self._period = max(1, round(self.period_s / series.step_s))

    def predict(self, values: Floats, steps: int) -> Floats:
        if len(values) < self._period:
            return np.full(steps, values[-1])
        season = values[-self._period :]
        return np.asarray(season[np.arange(steps) % self._period], dtype=np.float64)
