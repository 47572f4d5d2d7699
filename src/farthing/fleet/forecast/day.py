"""The day-ahead forecaster: Prophet, with the level of the last day, blended with a seasonal regression.

Prophet knows trend, seasons, holidays and events but not how today departs from them; a regression on
the same times of earlier days and weeks knows that but no holidays. The share of each is that which
would have been best on the days forecast so far.
"""

from __future__ import annotations

import numpy as np

from farthing.fleet.forecast.base import Floats
from farthing.fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing.fleet.forecast.ridge import RidgeAR
from farthing.fleet.series import DAY_S, Series

AHEAD_DAYS = 9  # forecast at each fit, so that later origins need no new one


class DayForecaster:
    """Prophet fitted at most every `refit_s`; `blend` adds the regression."""

    def __init__(
        self, config: ProphetConfig | None = None, blend: bool = True, refit_s: float = DAY_S
    ) -> None:
        self.prophet = ProphetForecaster(config)
        self.ridge = RidgeAR(recent=4, weeks=4, days=2, around=1, penalty=1.0) if blend else None
        self.refit_s = refit_s
        self.name = "day" if blend else "prophet"
        self._path: Floats = np.zeros(0)  # Prophet's forecast after the fitted series
        self._fitted = 0
        self._pairs: list[tuple[int, Floats, Floats]] = []  # origin, Prophet's and the regression's path

    def fit(self, series: Series) -> None:
        """Raises ValueError below two days of history."""
        due = round(self.refit_s / series.step_s)
        if self._fitted == 0 or len(series) - self._fitted >= due:
            self.prophet.fit(series)
            self._path = self.prophet.predict(AHEAD_DAYS * series.per_day)[0]
            self._fitted = len(series)
        if self.ridge is not None:
            self.ridge.fit(series)

    def predict(self, values: Floats, steps: int) -> Floats:
        offset = len(values) - self._fitted
        if offset < 0 or offset + steps > len(self._path):
            raise ValueError(
                f"DayForecaster: {steps} steps after {len(values)}; it was fitted at {self._fitted}"
            )
        prophet = self._path[offset : offset + steps]
        if self.ridge is None:
            return prophet
        ridge = self.ridge.predict(values, steps)
        share = self._share(values)
        self._pairs.append((len(values), prophet, ridge))
        return np.asarray(share * prophet + (1 - share) * ridge, dtype=np.float64)

    def _share(self, values: Floats) -> float:
        """Prophet's share: the best on the last 14 forecasts whose truth is known."""
        known = [
            (p, r, values[at : at + len(p)]) for at, p, r in self._pairs[-20:] if at + len(p) <= len(values)
        ]
        if not known:
            return 0.5
        prophet, ridge, truth = (np.concatenate(part) for part in zip(*known[-14:], strict=True))
        shares = np.linspace(0, 1, 11)
        losses = [np.abs(s * prophet + (1 - s) * ridge - truth).sum() for s in shares]
        return 0.5 * 0.3 + 0.7 * float(shares[int(np.argmin(losses))])
