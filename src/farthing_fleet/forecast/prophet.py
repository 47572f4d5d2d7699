"""Prophet: trend, seasons, holidays and scheduled events of a load of weeks."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from farthing_fleet.forecast.base import DAY_S, Floats, Series

HISTORY_S = 42 * DAY_S  # older values are ignored
DAILY_ORDER, WEEKLY_ORDER = 20, 60  # of its seasonal Fourier series


@dataclass(frozen=True)
class Event:
    """A scheduled event: all its dates (ISO), and the number of affected days around each."""

    name: str
    dates: tuple[str, ...]  # "2026-11-27", past dates to learn from and future ones to forecast
    days_before: int = 0
    days_after: int = 0

    def __post_init__(self) -> None:
        for text in self.dates:
            try:
                datetime.fromisoformat(text)
            except ValueError as error:
                raise ValueError(f"Event {self.name!r}: date {text!r}: expected YYYY-MM-DD") from error


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
