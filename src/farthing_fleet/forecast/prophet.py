"""Prophet: trend, seasons, holidays and scheduled events of a load of weeks."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from farthing_fleet.forecast.base import DAY_S, Floats

HISTORY_S = 42 * DAY_S  # older values are ignored
_NONE = logging.NullHandler()
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
    """What Prophet cannot see in the load."""

    country: str | None = None  # "US", "DE", …: public holidays of the library `holidays`
    events: tuple[Event, ...] = ()


class ProphetForecaster:
    """`fit` on loads, `predict` on their grid after them. Deterministic; works offline.

    A load's trend over weeks predicts little of tomorrow: without a trend the error is half.
    """

    def __init__(self, config: ProphetConfig | None = None) -> None:
        self.config = config or ProphetConfig()
        self._model: Any = None
        self._step_s, self._end = 0.0, 0.0

    def fit(self, start: float, step_s: float, values: Floats) -> None:
        """Fit at least two days of loads at start, start + step_s, …; ModuleNotFoundError without Prophet."""
        self._step_s, self._end = step_s, start + step_s * len(values)
        values = values[-round(HISTORY_S / step_s) :]
        times = self._end - step_s * np.arange(len(values), 0, -1, dtype=np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("prophet.plot").disabled = True  # it reports that plotly is not installed
            for name in ("prophet", "cmdstanpy"):
                logging.getLogger(name).setLevel(logging.ERROR)
                logging.getLogger(name).addHandler(_NONE)  # without one, cmdstanpy sets its level again
            import pandas
            from prophet import Prophet

            weeks = len(values) * step_s / (7 * DAY_S)
            model = Prophet(
                growth="flat",
                seasonality_mode="multiplicative",
                holidays=self._holidays(pandas),
                uncertainty_samples=0,
                yearly_seasonality=False,
                weekly_seasonality=WEEKLY_ORDER if weeks >= 2 else False,
                daily_seasonality=DAILY_ORDER,
            )
            if self.config.country:
                model.add_country_holidays(country_name=self.config.country)
            model.fit(pandas.DataFrame({"ds": _dates(times), "y": values}), seed=0)
        self._model = model

    def predict(self, steps: int) -> Floats:
        """[steps] the medians of the steps after the fitted ones."""
        import pandas

        times = self._end + self._step_s * np.arange(steps, dtype=np.float64)
        np.random.seed(0)
        table = self._model.predict(pandas.DataFrame({"ds": _dates(times)}))
        return np.maximum(np.asarray(table["yhat"], dtype=np.float64), 0.0)

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
