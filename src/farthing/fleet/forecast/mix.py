"""A mixture of forecasters, weighted by recent errors (exponentially weighted experts, Vovk 1990).

No single model is best on every load. Over any period the mixture is never much worse than its best member,
because a member's weight decays exponentially with its error.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from farthing.fleet.forecast.base import Floats, Forecaster, LastValue
from farthing.fleet.forecast.profile import ProfileAR, ProfileConfig
from farthing.fleet.forecast.ridge import AbsoluteAR, RidgeAR
from farthing.fleet.series import Series


class Mix:
    """Experts mixed by exp(-rate · relative error); errors decay with a half-life of `half_life` steps.

    `predict` refits the cheap experts every `refit_steps`; the slow ones are fitted only by `fit`.
    """

    name = "mix"

    def __init__(
        self,
        experts: list[Forecaster] | None = None,
        slow: list[Forecaster] | None = None,
        rate: float = 4.0,
        half_life: float = 96.0,
        refit_steps: int = 12,
    ) -> None:
        self.experts = experts if experts is not None else default_experts()
        self.slow = slow if slow is not None else []
        self.rate, self.decay, self.refit_steps = rate, 0.5 ** (1 / half_life), refit_steps
        self._loss: Floats = np.zeros(len(self.experts) + len(self.slow))
        self._seen = 0
        self._fitted = 0
        self._step_s = 1.0
        self._next: tuple[int, Floats] | None = None  # history length and each expert's next step

    def fit(self, series: Series) -> None:
        for expert in (*self.experts, *self.slow):
            expert.fit(series)
        self._step_s, self._fitted = series.step_s, len(series)
        self._seen = self._seen or max(
            1, len(series) - 288
        )  # errors of the last steps determine the initial weights
        self._learn(series.values)
        self._next = None

    def predict(self, values: Floats, steps: int) -> Floats:
        self._learn(values)
        if len(values) - self._fitted >= self.refit_steps:
            for expert in self.experts:
                expert.fit(Series(0.0, self._step_s, values))
            self._fitted = len(values)
        paths = np.stack([expert.predict(values, steps) for expert in (*self.experts, *self.slow)])
        self._next = (len(values), paths[:, 0])
        weights = np.exp(-self.rate * (self._loss - self._loss.min()))
        return np.asarray((weights / weights.sum()) @ paths, dtype=np.float64)

    def _learn(self, values: Floats) -> None:
        for n in range(max(1, self._seen), len(values)):
            if self._next is not None and self._next[0] == n:
                step = self._next[1]
            else:
                step = np.array([e.predict(values[:n], 1)[0] for e in (*self.experts, *self.slow)])
            level = float(values[max(0, n - 36) : n].mean())
            self._loss = self.decay * self._loss + np.abs(step - values[n]) / max(level, 1e-9)
        self._seen = max(self._seen, len(values))


def default_experts() -> list[Forecaster]:
    """The last value, autoregressions with several history lengths, and the seasonal naive one."""
    jagged = [
        AbsoluteAR(lags, penalty, window)
        for lags in (3, 6, 9, 12, 18)
        for penalty in (1.0, 10.0, 50.0)
        for window in (144, 288, 576, 1500)
    ]
    return [
        LastValue(),
        *jagged,
        RidgeAR(),
        RidgeAR(weeks=4, days=1, neighbors=4),
        RidgeAR(weeks=8, neighbors=2),
    ]


def profiles(country: str | None = None) -> list[Forecaster]:
    """Weekly profiles with two history lengths and regressions for the next step; too slow to refit often."""
    made = ProfileConfig(recent=8, neighbors=2, penalty=1.0, country=country)
    return [ProfileAR(replace(made, periods=periods)) for periods in (4, 6)]
