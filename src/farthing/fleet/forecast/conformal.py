"""Upper quantiles from past errors by adaptive conformal inference (Gibbs and Candès 2021)."""

from __future__ import annotations

from collections import deque

import numpy as np

from farthing.fleet.forecast.base import Floats


class Conformal:
    """The `target` quantile of the outcome above a point forecast, relative to it, per step ahead.

    After every outcome the level moves by `rate`, so that the share of outcomes at or below the bound tends
    to `target` even if the errors drift.
    """

    def __init__(self, target: float = 0.9, window: int = 500, rate: float = 0.01) -> None:
        if not 0.5 <= target < 1:
            raise ValueError(f"Conformal.target: got {target}; expected a number in [0.5, 1)")
        self.target, self.rate = target, rate
        self._level = target
        self._errors: deque[Floats] = deque(maxlen=window)

    def bound(self, point: Floats) -> Floats:
        """[steps] upper quantile for the point forecast [steps]; the point itself before any error."""
        if not self._errors:
            return point
        errors = np.stack(list(self._errors))
        ratio = np.quantile(errors, self._level, axis=0)
        return np.asarray(np.maximum(point * (1 + ratio), 0.0), dtype=np.float64)

    def learn(self, point: Floats, bound: Floats, truth: Floats) -> None:
        """Update from the outcome of a forecast; all [steps]."""
        if self._errors:
            covered = float((truth <= bound).mean())
            self._level = min(max(self._level + self.rate * (self.target - covered), 0.5), 1.0)
        self._errors.append((truth - point) / np.maximum(point, 1e-9))
