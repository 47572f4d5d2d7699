"""Load series, the forecaster interface, and the baselines: last value, seasons, autoregression."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farthing.bench.trace import check_span, columns, csv_rows, first_line
from farthing.files import replace_text

# A load series on a regular grid: slicing, averaging, reading.

Array = NDArray[np.float64]
DAY_S = 86400.0
_MAX_STEPS = 10_000_000  # 19 years of minutes; bounds the memory that one wrong time allocates
_MAX_TIME_S, _MAX_VALUE = 1e11, 1e12


@dataclass(frozen=True)
class Series:
    """Values at start, start + step_s, …; load units per second (or the column's unit)."""

    start: float  # seconds since the epoch, or 0 if the file has only offsets
    step_s: float
    values: Array  # [T] float64, finite, not negative
    name: str = "series"

    def __post_init__(self) -> None:
        if not self.step_s > 0:
            raise ValueError(f"Series.step_s: got {self.step_s}; expected a positive number of seconds")
        if self.values.ndim != 1 or len(self.values) == 0:
            raise ValueError(
                f"Series.values has shape {self.values.shape}: expected one dimension with at least one value"
            )
        bad = np.flatnonzero(~np.isfinite(self.values) | (self.values < 0))
        if bad.size:
            at = int(bad[0])
            raise ValueError(
                f"{self.name}: value {self.values[at]} at row {at}: expected a finite number >= 0"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.values)

    @property
    def times(self) -> Array:
        """[T] seconds."""
        return self.start + self.step_s * np.arange(len(self.values), dtype=np.float64)

    @property
    def per_day(self) -> int:
        """Steps per day, at least 1."""
        return max(1, round(DAY_S / self.step_s))

    def head(self, steps: int) -> Series:
        return Series(self.start, self.step_s, self.values[:steps], self.name)

    def tail(self, steps: int) -> Series:
        first = max(0, len(self) - steps)
        return Series(self.start + first * self.step_s, self.step_s, self.values[first:], self.name)

    def coarse(self, factor: int) -> Series:
        """Means of groups of `factor` steps; drops the oldest incomplete group, so that the end stays."""
        if factor < 1 or factor > len(self):
            raise ValueError(f"Series.coarse: factor {factor}: expected 1 to {len(self)}")
        skip = len(self) % factor
        values = self.values[skip:].reshape(-1, factor).mean(axis=1)
        return Series(self.start + skip * self.step_s, self.step_s * factor, values, self.name)


def read_series(path: str | Path, most_s: float = math.inf) -> Series:
    """Read a rate series from CSV with columns `t_s,total_rate_rps` or `timestamp,value`, plain or gzip.

    Values of the second form are counts per step and are kept. Missing steps are interpolated linearly.
    Raises ValueError with the columns found, or with the line and field; also if it spans more than `most_s`.
    """
    path = Path(path)
    names, rows = columns(first_line(path)), list(csv_rows(path))
    if {"t_s", "total_rate_rps"} <= set(names):
        when, what = "t_s", "total_rate_rps"
        times = [row.number(when, -_MAX_TIME_S, _MAX_TIME_S) for row in rows]
    elif {"timestamp", "value"} <= set(names):
        when, what = "timestamp", "value"
        times = [row.time(when) for row in rows]
    else:
        accepted = ", ".join(names) or "none"
        raise ValueError(f"{path}: got columns {accepted}; expected t_s,total_rate_rps or timestamp,value")
    values = [row.number(what, 0, _MAX_VALUE) for row in rows]
    if len(rows) < 2:
        raise ValueError(f"{path}: got {len(rows)} rows; expected at least two")
    data = np.array(sorted(zip(times, values, strict=True)), dtype=np.float64)
    step = float(np.median(np.diff(data[:, 0])))
    if step <= 0:
        raise ValueError(f"{path}: times do not increase; expected one row per step")
    check_span(path, when, times, [row.line for row in rows], min(most_s, _MAX_STEPS * step))
    grid = np.arange(data[0, 0], data[-1, 0] + step / 2, step)
    return Series(float(data[0, 0]), step, np.interp(grid, data[:, 0], data[:, 1]), path.name.split(".")[0])


# A forecast for the policy and the dashboard: a curve of quantiles.

FORECASTS = "forecasts.json"  # in the state directory: the curves of the last decision


@dataclass(frozen=True)
class Forecast:
    """A quantile forecast on a grid: value i applies to [start + i·step_s, start + (i+1)·step_s).

    The short-term forecaster returns one or a few steps, the day plan 24 hours. `skill` is the running value
    of 1 - error / error of the last value; below zero the forecaster is replaced, and `source` names the
    replacement.
    """

    start: float
    step_s: float
    p50: tuple[float, ...]
    p90: tuple[float, ...]
    source: str
    skill: float | None = None
    note: str = ""  # for instance "lstm replaced by last-value: running skill -0.12"
    weight: float | None = None  # of `source` in a mixture of forecasters

    def __post_init__(self) -> None:
        if len(self.p50) != len(self.p90) or not self.p50:
            raise ValueError(
                f"Forecast: p50, p90 have lengths {len(self.p50)}, {len(self.p90)}; expected equal and >= 1"
            )
        if not self.step_s > 0:
            raise ValueError(f"Forecast.step_s: got {self.step_s}; expected a positive number of seconds")
        if not all(math.isfinite(v) and v >= 0 for v in (*self.p50, *self.p90)):
            raise ValueError("Forecast: expected finite p50 and p90 >= 0")

    @property
    def end(self) -> float:
        return self.start + self.step_s * len(self.p50)

    def peak(self, begin: float, end: float, quantile: float = 0.9) -> float | None:
        """The largest value over [begin, end] at `quantile`; None outside the forecast.

        Quantiles other than 0.5 and 0.9 are interpolated linearly.
        """
        first = max(0, math.floor((begin - self.start) / self.step_s))
        last = min(len(self.p50) - 1, math.floor((end - self.start) / self.step_s))
        if first > last:
            return None
        weight = (quantile - 0.5) / 0.4
        return max(
            max(0.0, low + weight * (high - low))
            for low, high in zip(self.p50[first : last + 1], self.p90[first : last + 1], strict=True)
        )


def write_forecasts(path: Path, unit: str, short: Forecast | None, mid: Forecast | None) -> None:
    """Write the current forecasts for the dashboard, atomically."""
    forecasts = {name: asdict(f) for name, f in (("short", short), ("mid", mid)) if f is not None}
    replace_text(path, json.dumps({"unit": unit, "forecasts": forecasts}), durable=False)


def read_forecasts(path: Path) -> tuple[str, dict[str, Any]]:
    """(unit, {level: forecast}) as written by `write_forecasts`; ("requests", {}) if there are none."""
    try:
        data = json.loads(path.read_text())
        return str(data["unit"]), dict(data["forecasts"])
    except (OSError, ValueError, KeyError):
        return "requests", {}


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


# An autoregression for jagged series, fitted to the least absolute error.

MIN_ROWS = 30


class AbsoluteAR:
    """The next step from the last differences, relative to the recent level, minimizing the absolute error.

    Uses `lags` previous values, fitted on the last `window` steps by iteratively reweighted least squares
    with a penalty towards the last-value forecast. Forecasts several steps recursively.
    """

    def __init__(self, lags: int = 6, penalty: float = 10.0, window: int = 576) -> None:
        self.lags, self.penalty, self.window = lags, penalty, window
        self.name = f"ar{lags}-{window}-{penalty:g}"
        self._weights: Floats = np.zeros(lags)

    def fit(self, series: Series) -> None:
        values = series.values[-(self.window + self.lags + 6) :]
        self._weights = np.zeros(self.lags)
        if len(values) < self.lags + MIN_ROWS:
            return
        level = _level(values)
        now = np.arange(self.lags, len(values) - 1)
        scale = level[now]
        rows = np.stack([(values[now - k] - values[now]) / scale for k in range(1, self.lags + 1)], axis=1)
        truth = (values[now + 1] - values[now]) / scale
        importance = scale / scale.mean()
        for _ in range(15):
            weight = importance / np.maximum(np.abs(truth - rows @ self._weights), 0.02)
            gram = (rows * weight[:, None]).T @ rows + self.penalty * np.eye(self.lags)
            self._weights = np.linalg.solve(gram, (rows * weight[:, None]).T @ truth)

    def predict(self, values: Floats, steps: int) -> Floats:
        past = values[-(self.lags + 6) :].copy()
        out = np.empty(steps)
        for step in range(steps):
            back = past[-self.lags - 1 : -1][::-1]
            moved = past[-1] + (back - past[-1]) @ self._weights[: len(back)]
            out[step] = np.clip(moved, 0.0, 3 * past.max() + 1e-9)
            past = np.append(past[1:], out[step])
        return out


def _level(values: Floats) -> Floats:
    """[n] mean of the last six values, never zero."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - 6)
    return np.asarray(np.maximum((total[last] - total[first]) / (last - first), 1e-9), dtype=np.float64)
