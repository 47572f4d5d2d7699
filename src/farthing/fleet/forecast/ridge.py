"""Autoregressions: ridge regression on logarithms for seasonal series, absolute error for jagged series."""

from __future__ import annotations

import numpy as np

from farthing.fleet.forecast.base import Floats
from farthing.fleet.series import DAY_S, Series

MIN_ROWS = 30


class RidgeAR:
    """log(1 + y) regressed on its last values and on the same time of earlier days and weeks, with neighbors.

    One regression per step ahead, so that every step uses the newest values available. Seasonal lags are used
    only if the history is at least three times as long.
    """

    name = "ridge"

    def __init__(
        self, recent: int = 8, weeks: int = 6, days: int = 1, neighbors: int = 3, penalty: float = 0.1
    ) -> None:
        self.recent, self.weeks, self.days, self.neighbors, self.penalty = (
            recent,
            weeks,
            days,
            neighbors,
            penalty,
        )
        self._series: Series | None = None
        self._seasons: list[int] = []
        self._weights: dict[int, tuple[Floats, list[int]]] = {}

    def fit(self, series: Series) -> None:
        day = max(1, round(DAY_S / series.step_s))
        self._seasons = [day * d for d in range(1, self.days + 1)] if day > 4 else []
        self._seasons += [7 * day * w for w in range(1, self.weeks + 1)]
        self._seasons = [s for s in self._seasons if 2 * s + self.neighbors < len(series)]
        self._series, self._weights = series, {}

    def predict(self, values: Floats, steps: int) -> Floats:
        """Forecast; the last value if the history is too short. Raises ValueError before `fit`."""
        if self._series is None:
            raise ValueError("RidgeAR.predict: call fit first")
        logs = np.log1p(values)
        out = np.empty(steps)
        for ahead in range(1, steps + 1):
            weights, lags = self._fitted(ahead)
            target = len(values) + ahead - 1
            if not lags or target - max(lags) < 0:
                out[ahead - 1] = values[-1]
                continue
            row = np.append(logs[[target - lag for lag in lags]], 1.0)
            out[ahead - 1] = np.expm1(np.clip(row @ weights, 0.0, 50.0))
        return np.maximum(out, 0.0)

    def _fitted(self, ahead: int) -> tuple[Floats, list[int]]:
        """Weights (constant last) and lags before the target for a forecast `ahead` steps ahead."""
        if ahead in self._weights:
            return self._weights[ahead]
        assert self._series is not None
        logs = np.log1p(self._series.values)
        near = {ahead + k for k in range(self.recent)}
        far = {s + k for s in self._seasons for k in range(-self.neighbors, self.neighbors + 1)}
        lags = sorted(near | {lag for lag in far if lag >= ahead})
        first = max(lags)
        if len(logs) - first < max(MIN_ROWS, len(lags)):
            self._weights[ahead] = (np.zeros(0), [])
            return self._weights[ahead]
        rows = np.stack([logs[first - lag : len(logs) - lag] for lag in lags], axis=1)
        truth = logs[first:]
        centre, offset = rows.mean(axis=0), truth.mean()
        spread = rows.std(axis=0) + 1e-9
        scaled = (rows - centre) / spread
        gram = scaled.T @ scaled + self.penalty * np.eye(len(lags))
        slope = np.linalg.solve(gram, scaled.T @ (truth - offset)) / spread
        self._weights[ahead] = (np.append(slope, offset - centre @ slope), lags)
        return self._weights[ahead]


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
