"""The day ahead: Prophet blended with the weekly profile, and the share of that plan to use as a floor.

Prophet models trend, seasons, holidays and events but not today's departure from them; the profile's
regression does. They are blended with the share that would have been best on the days forecast so far. If
repeating yesterday or last week would have been better on this series, that is the forecast. Before the
first forecast has an outcome, the shares are judged by forecasting the last days of the fitted history.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from farthing_fleet.forecast.base import DAY_S, Floats, Series
from farthing_fleet.forecast.profile import AHEAD_DAYS, Event, ProfileAR, ProfileConfig

HISTORY_S = 42 * DAY_S  # Prophet ignores older values
DAILY_ORDER, WEEKLY_ORDER = 20, 60  # of its seasonal Fourier series


@dataclass(frozen=True)
class ProphetConfig:
    """Settings of Prophet; docs/lab/learned-forecasts.md explains the defaults.

    A load's trend over weeks predicts little of tomorrow: without a trend (`growth` flat) the error is half.
    """

    country: str | None = None  # "US", "DE", …: public holidays of the library `holidays`
    events: tuple[Event, ...] = ()
    growth: Literal["flat", "linear"] = "flat"
    changepoint_prior_scale: float = 0.05  # of a linear trend
    seasonality_prior_scale: float = 10.0
    multiplicative: bool = True
    log: bool = False  # forecast log(1 + value): for multiplicative noise


class ProphetForecaster:
    """`fit` on a series, `predict` on a grid after it. Deterministic; works offline."""

    def __init__(self, config: ProphetConfig | None = None) -> None:
        self.config = config or ProphetConfig()
        self._model: Any = None
        self._step_s, self._end = 0.0, 0.0

    def fit(self, series: Series) -> ProphetForecaster:
        """Fit. Raises ValueError with less than two days of history, ModuleNotFoundError without Prophet."""
        if len(series) * series.step_s < 2 * DAY_S:
            raise ValueError(f"{series.name}: expected at least two days of history for Prophet")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("prophet").setLevel(logging.ERROR)
            logging.getLogger("cmdstanpy").setLevel(logging.ERROR)
            import pandas
            from prophet import Prophet

            recent = series.tail(max(2, round(HISTORY_S / series.step_s)))
            weeks = len(recent) * recent.step_s / (7 * DAY_S)
            model = Prophet(
                growth=self.config.growth if weeks >= 3 else "flat",
                changepoint_prior_scale=self.config.changepoint_prior_scale,
                seasonality_prior_scale=self.config.seasonality_prior_scale,
                seasonality_mode="multiplicative" if self.config.multiplicative else "additive",
                holidays=self._holidays(pandas),
                interval_width=0.8,  # its upper edge is the 0.9 quantile
                uncertainty_samples=200,
                yearly_seasonality=False,
                weekly_seasonality=WEEKLY_ORDER if weeks >= 2 else False,
                daily_seasonality=DAILY_ORDER,
            )
            if self.config.country:
                model.add_country_holidays(country_name=self.config.country)
            values = np.log1p(recent.values) if self.config.log else recent.values
            model.fit(pandas.DataFrame({"ds": _dates(recent.times), "y": values}), seed=0)
        self._model, self._step_s, self._end = model, series.step_s, series.end
        return self

    def predict(self, steps: int) -> tuple[Floats, Floats]:
        """([steps], [steps]) median and 0.9 quantile of the steps after the fitted series."""
        if self._model is None:
            raise ValueError("ProphetForecaster.predict: call fit first")
        import pandas

        times = self._end + self._step_s * np.arange(steps, dtype=np.float64)
        np.random.seed(0)
        table = self._model.predict(pandas.DataFrame({"ds": _dates(times)}))
        p50, p90 = (np.asarray(table[name], dtype=np.float64) for name in ("yhat", "yhat_upper"))
        if self.config.log:
            p50, p90 = np.expm1(p50), np.expm1(p90)
        return np.maximum(p50, 0.0), np.maximum(p90, np.maximum(p50, 0.0))

    def _holidays(self, pandas: Any) -> Any:
        rows = [
            {
                "holiday": event.name,
                "ds": pandas.Timestamp(date),
                "lower_window": -event.days_before,
                "upper_window": event.days_after,
            }
            for event in self.config.events
            for date in event.dates
        ]
        return pandas.DataFrame(rows) if rows else None


def _dates(times: Floats) -> list[datetime]:
    return [datetime.fromtimestamp(float(t), UTC).replace(tzinfo=None) for t in times]


FLOOR_SHARES = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # [S]; never less than half of the plan
SHORTAGE = 10.0  # cost of a unit of load without capacity, relative to a unit of idle capacity
FIRST_FLOOR_SHARE = 1.0  # use the whole plan before any judgement


def floor_losses(planned: Floats, bound: Floats, truth: Floats, utilization: float) -> Floats:
    """[n, S] loss of each share for planned, short-term bound and true peaks of the load, all [n].

    The short-term bound already covers the next cold start. A floor above it costs replicas every day, and
    helps only when the load exceeds what the bound's replicas can carry, which is more than the bound,
    because they are provisioned at a target utilization. The floor is therefore the share of the plan with
    the least loss over the last days: a unit of load provisioned above the bound counts once, a unit that
    could not be carried ten times.

    Shapes: S = shares tried, n = judgements.
    """
    offered = np.maximum(bound[:, None], planned[:, None] * FLOOR_SHARES)
    missed = np.maximum(0.0, truth[:, None] - offered / utilization)
    return np.asarray(offered - bound[:, None] + SHORTAGE * missed, dtype=np.float64)


def best_share(losses: Floats) -> float:
    """The share with the smallest sum of `losses` [n, S]; ties go to the smallest share."""
    if not len(losses):
        return FIRST_FLOOR_SHARE
    return float(FLOOR_SHARES[int(np.argmin(losses.sum(axis=0).round(9)))])


class FloorShare:
    """The share, learned online."""

    def __init__(self, window: int, utilization: float = 0.7) -> None:
        self.utilization = utilization
        self._losses: deque[Floats] = deque(maxlen=window)
        self.share = FIRST_FLOOR_SHARE

    def learn(self, planned: float, bound: float, truth: float) -> None:
        """Add one planned peak, its bound and the true peak."""
        losses = floor_losses(np.array([planned]), np.array([bound]), np.array([truth]), self.utilization)
        self._losses.append(losses[0])

    def settle(self) -> float:
        """Choose the share again; call once a day so that the floor does not oscillate."""
        self.share = best_share(np.array(self._losses).reshape(-1, len(FLOOR_SHARES)))
        return self.share


PERIODS = (4, 9)  # history lengths of the two averaged profiles
FIRST_SHARE = 0.2  # Prophet's share before any outcome
SHARES = np.linspace(0.0, 1.0, 11)
JUDGED = 14  # number of forecasts used to judge the shares
NAIVE_DAYS = {"yesterday": 1, "last-week": 7}
HELD_DAYS = 7  # maximum days of history to judge on initially; a quarter of a shorter history


@dataclass(frozen=True)
class _Candidates:
    """The candidates' forecasts [steps] from one origin, kept until the outcome is known."""

    time: float
    prophet: Floats
    profile: Floats | None
    naive: dict[str, Floats]


@dataclass(frozen=True)
class ChosenForecast:
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
        self.choice = ChosenForecast()
        self._path: Floats = np.zeros(0)  # Prophet's forecast after the fitted series
        self._ratio: Floats = np.zeros(0)  # ratio of its 0.9 quantile to the median
        self._fitted, self._start, self._step_s = 0, 0.0, 1.0
        self._issued: deque[_Candidates] = deque(maxlen=2 * JUDGED)

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
        candidates = self._candidates(values, steps)
        point = candidates.prophet
        if self.blend:
            self.choice = self._choose(values)
            self._issued.append(candidates)
            if self.choice.name != "blend":
                point = candidates.naive[self.choice.name]
            else:
                point = _blended(candidates.prophet, candidates.profile, self.choice.share)
        ratio = self._ratio[len(values) - self._fitted :][:steps]
        return np.asarray(point, dtype=np.float64), np.asarray(np.maximum(point * ratio, point))

    def _fit_prophet(self, series: Series) -> None:
        self.prophet.fit(series)
        self._path, high = self.prophet.predict(AHEAD_DAYS * series.per_day)
        self._ratio = high / np.maximum(self._path, 1e-9)
        self._fitted, self._start, self._step_s = len(series), series.start, series.step_s

    def _rehearse(self, series: Series) -> None:
        """Forecast the last days of the history from the data before them, to judge the shares initially."""
        self._issued.clear()
        day = series.per_day
        days = min(HELD_DAYS, len(series) // day // 4)
        if len(series) - days * day < 3 * day or days < 1:
            return
        past = series.head(len(series) - days * day)
        self._fit_prophet(past)
        for profile in self.profiles:
            profile.fit(past)
        for end in range(len(past), len(series) - day + 1, day):
            self._issued.append(self._candidates(series.values[:end], day))

    def _candidates(self, values: Floats, steps: int) -> _Candidates:
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
        return _Candidates(time, self._path[offset : offset + steps], profile, naive)

    def _choose(self, values: Floats) -> ChosenForecast:
        """The choice that would have been best on the last forecasts with a known outcome."""
        judged = []
        for candidates in list(self._issued)[-JUDGED:]:
            at = round((candidates.time - self._start) / self._step_s)
            truth = values[at : at + len(candidates.prophet)] if at >= 0 else values[:0]
            if len(truth):
                judged.append((candidates, truth))
        if not judged:
            return ChosenForecast()

        def loss(share: float) -> float:
            paths = (
                _blended(candidates.prophet, candidates.profile, share)[: len(t)] for candidates, t in judged
            )
            return sum(float(np.abs(p - t).sum()) for p, (_, t) in zip(paths, judged, strict=True))

        losses = {ChosenForecast(share=float(share)): loss(share) for share in SHARES}
        for name in NAIVE_DAYS:
            if all(name in candidates.naive for candidates, _ in judged):
                losses[ChosenForecast(name)] = sum(
                    float(np.abs(m.naive[name][: len(t)] - t).sum()) for m, t in judged
                )
        return min(losses, key=lambda choice: losses[choice])


def _blended(prophet: Floats, profile: Floats | None, share: float) -> Floats:
    return prophet if profile is None else np.asarray(share * prophet + (1 - share) * profile)
