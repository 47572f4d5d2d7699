"""The day-ahead forecaster: Prophet, blended with the weekly profile and its departures.

Prophet knows trend, seasons, holidays and events but not how today departs from them; the profile's
regression knows that. The share of each is that which would have been best on the days forecast so far.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from farthing.fleet.forecast.base import Floats
from farthing.fleet.forecast.profile import AHEAD_DAYS, ProfileAR, ProfileConfig
from farthing.fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing.fleet.series import DAY_S, Series

PERIODS = (4, 9)  # memories of the two profiles whose mean is taken
FIRST_SHARE = 0.2  # Prophet's, before anything was forecast
SHARES = np.linspace(0.0, 1.0, 11)
JUDGED = 14  # forecasts the share is judged on


class DayForecaster:
    """Prophet fitted at most every `refit_s`; `blend` adds the profile. It reaches nine days ahead."""

    def __init__(
        self, config: ProphetConfig | None = None, blend: bool = True, refit_s: float = DAY_S
    ) -> None:
        self.prophet = ProphetForecaster(config)
        told = self.prophet.config
        parts = [ProfileConfig(periods=p, country=told.country, events=told.events) for p in PERIODS]
        self.profiles = [ProfileAR(part) for part in parts] if blend else []
        self.refit_s = refit_s
        self.name = "day" if blend else "prophet"
        self._path: Floats = np.zeros(0)  # Prophet's forecast after the fitted series
        self._ratio: Floats = np.zeros(0)  # of its 0.9 quantile to it
        self._fitted, self._start, self._step_s = 0, 0.0, 1.0
        self._pairs: deque[tuple[float, Floats, Floats]] = deque(maxlen=2 * JUDGED)  # time, Prophet, profile

    def fit(self, series: Series) -> None:
        """Raises ValueError below two days of history."""
        due = round(self.refit_s / series.step_s)
        moved = series.start != self._start
        if self._fitted == 0 or moved or len(series) - self._fitted >= due:
            self.prophet.fit(series)
            self._path, high = self.prophet.predict(AHEAD_DAYS * series.per_day)
            self._ratio = high / np.maximum(self._path, 1e-9)
            self._fitted, self._start, self._step_s = len(series), series.start, series.step_s
        for profile in self.profiles:
            profile.fit(series)

    def predict(self, values: Floats, steps: int) -> Floats:
        return self.quantiles(values, steps)[0]

    def quantiles(self, values: Floats, steps: int) -> tuple[Floats, Floats]:
        """([steps], [steps]) median and 0.9 quantile; the width of the interval is Prophet's."""
        offset = len(values) - self._fitted
        if offset < 0 or offset + steps > len(self._path):
            raise ValueError(
                f"DayForecaster: {steps} steps after {len(values)}; it was fitted at {self._fitted}"
            )
        point = self._path[offset : offset + steps]
        ready = [part for part in self.profiles if part.ready]
        if ready:
            profile = np.mean([part.predict(values, steps) for part in ready], axis=0)
            share = self._share(values)
            self._pairs.append((self._start + self._step_s * len(values), point, profile))
            point = share * point + (1 - share) * profile
        ratio = self._ratio[offset : offset + steps]
        return np.asarray(point, dtype=np.float64), np.asarray(np.maximum(point * ratio, point))

    def _share(self, values: Floats) -> float:
        """Prophet's share: the best on the last forecasts, as far as their truth is known."""
        known = []
        for time, prophet, profile in list(self._pairs)[-JUDGED:]:
            at = round((time - self._start) / self._step_s)
            truth = values[at : at + len(prophet)] if at >= 0 else values[:0]
            known.append((prophet[: len(truth)], profile[: len(truth)], truth))
        if not sum(len(truth) for _, _, truth in known):
            return FIRST_SHARE
        prophet, profile, truth = (np.concatenate(part) for part in zip(*known, strict=True))
        losses = [np.abs(s * prophet + (1 - s) * profile - truth).sum() for s in SHARES]
        return float(SHARES[int(np.argmin(losses))])
