"""An autoregression for jagged series, fitted to the least absolute error."""

from __future__ import annotations

import numpy as np

from farthing.fleet.forecast.base import Floats
from farthing.fleet.series import Series

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
