"""The day-ahead forecaster: Prophet blended with the weekly profile, or a naive forecast if that is better.

Prophet models trend, seasons, holidays and events but not today's departure from them; the profile's
regression does. They are blended with the share that would have been best on the days forecast so far. If
repeating yesterday or last week would have been better on this series, that is the forecast. Before the first
forecast has an outcome, the shares are judged by forecasting the last days of the fitted history.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from farthing.fleet.forecast.base import Floats
from farthing.fleet.forecast.profile import AHEAD_DAYS, ProfileAR, ProfileConfig
from farthing.fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing.fleet.series import DAY_S, Series

PERIODS = (4, 9)  # history lengths of the two averaged profiles
FIRST_SHARE = 0.2  # Prophet's share before any outcome
SHARES = np.linspace(0.0, 1.0, 11)
JUDGED = 14  # number of forecasts used to judge the shares
NAIVE_DAYS = {"yesterday": 1, "last-week": 7}
HELD_DAYS = 7  # maximum days of history to judge on initially; a quarter of a shorter history


@dataclass(frozen=True)
class _Made:
    """The candidates' forecasts [steps] from one origin, kept until the outcome is known."""

    time: float
    prophet: Floats
    profile: Floats | None
    naive: dict[str, Floats]


@dataclass(frozen=True)
class Choice:
    """The chosen forecast: `name` is "blend" or a naive forecast; `share` is Prophet's in the blend."""

    name: str = "blend"
    share: float = FIRST_SHARE


class DayForecaster:
    """Prophet fitted at most every `refit_s`; `blend` adds profile and naive forecasts. Nine days ahead."""

    def __init__(
        self, config: ProphetConfig | None = None, blend: bool = True, refit_s: float = DAY_S
    ) -> None:
        self.prophet = ProphetForecaster(config)
        told = self.prophet.config
        parts = [ProfileConfig(periods=p, country=told.country, events=told.events) for p in PERIODS]
        self.profiles = [ProfileAR(part) for part in parts] if blend else []
        self.blend, self.refit_s = blend, refit_s
        self.name = "day" if blend else "prophet"
        self.choice = Choice()
        self._path: Floats = np.zeros(0)  # Prophet's forecast after the fitted series
        self._ratio: Floats = np.zeros(0)  # ratio of its 0.9 quantile to the median
        self._fitted, self._start, self._step_s = 0, 0.0, 1.0
        self._made: deque[_Made] = deque(maxlen=2 * JUDGED)

    def fit(self, series: Series) -> None:
        """Fit on the history. Raises ValueError with less than two days."""
        due = round(self.refit_s / series.step_s)
        moved = series.start != self._start
        if self.blend and (self._fitted == 0 or moved):
            self._rehearse(series)
        if self._fitted == 0 or moved or len(series) - self._fitted >= due:
            self._fit_prophet(series)
        for profile in self.profiles:
            profile.fit(series)

    def predict(self, values: Floats, steps: int) -> Floats:
        return self.quantiles(values, steps)[0]

    def quantiles(self, values: Floats, steps: int) -> tuple[Floats, Floats]:
        """([steps], [steps]) median and 0.9 quantile; with the width of Prophet's interval."""
        made = self._candidates(values, steps)
        point = made.prophet
        if self.blend:
            self.choice = self._choose(values)
            self._made.append(made)
            if self.choice.name != "blend":
                point = made.naive[self.choice.name]
            else:
                point = _blended(made.prophet, made.profile, self.choice.share)
        ratio = self._ratio[len(values) - self._fitted :][:steps]
        return np.asarray(point, dtype=np.float64), np.asarray(np.maximum(point * ratio, point))

    def _fit_prophet(self, series: Series) -> None:
        self.prophet.fit(series)
        self._path, high = self.prophet.predict(AHEAD_DAYS * series.per_day)
        self._ratio = high / np.maximum(self._path, 1e-9)
        self._fitted, self._start, self._step_s = len(series), series.start, series.step_s

    def _rehearse(self, series: Series) -> None:
        """Forecast the last days of the history from the data before them, to judge the shares initially."""
        self._made.clear()
        day = series.per_day
        held = min(HELD_DAYS, len(series) // day // 4)
        if len(series) - held * day < 3 * day or held < 1:
            return
        known = series.head(len(series) - held * day)
        self._fit_prophet(known)
        for profile in self.profiles:
            profile.fit(known)
        for end in range(len(known), len(series) - day + 1, day):
            self._made.append(self._candidates(series.values[:end], day))

    def _candidates(self, values: Floats, steps: int) -> _Made:
        offset = len(values) - self._fitted
        if offset < 0 or offset + steps > len(self._path):
            raise ValueError(f"DayForecaster: {steps} steps after {len(values)}; fitted at {self._fitted}")
        ready = [part for part in self.profiles if part.ready]
        profile = np.mean([part.predict(values, steps) for part in ready], axis=0) if ready else None
        naive, day = {}, max(1, round(DAY_S / self._step_s))
        for name, days in NAIVE_DAYS.items():
            if len(values) >= days * day:
                naive[name] = values[-days * day :][np.arange(steps) % (days * day)]
        time = self._start + self._step_s * len(values)
        return _Made(time, self._path[offset : offset + steps], profile, naive)

    def _choose(self, values: Floats) -> Choice:
        """The choice that would have been best on the last forecasts with a known outcome."""
        known = []
        for made in list(self._made)[-JUDGED:]:
            at = round((made.time - self._start) / self._step_s)
            truth = values[at : at + len(made.prophet)] if at >= 0 else values[:0]
            if len(truth):
                known.append((made, truth))
        if not known:
            return Choice()

        def loss(share: float) -> float:
            paths = (_blended(made.prophet, made.profile, share)[: len(t)] for made, t in known)
            return sum(float(np.abs(p - t).sum()) for p, (_, t) in zip(paths, known, strict=True))

        losses = {Choice(share=float(share)): loss(share) for share in SHARES}
        for name in NAIVE_DAYS:
            if all(name in made.naive for made, _ in known):
                losses[Choice(name)] = sum(float(np.abs(m.naive[name][: len(t)] - t).sum()) for m, t in known)
        return min(losses, key=lambda choice: losses[choice])


def _blended(prophet: Floats, profile: Floats | None, share: float) -> Floats:
    return prophet if profile is None else np.asarray(share * prophet + (1 - share) * profile)
