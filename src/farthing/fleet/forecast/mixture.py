"""A mixture of quantile forecasts: members calibrated, weighted by pinball loss, and the sum calibrated too.

Every member's 0.9 quantile gets an offset, adjusted after each outcome (online gradient descent on the
pinball loss: Angelopoulos, Candès and Tibshirani 2023), so that it covers 90 % whatever its errors. Weights
decay exponentially with the loss relative to the best member's; losses decay over days.

Shapes: M = members, B = runs side by side.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from farthing.fleet.forecast.base import Floats


@dataclass(frozen=True)
class MixtureConfig:
    """Speed of weights and offsets; times in leads (one cold start plus one interval)."""

    quantile: float = 0.9
    rate: float = 8.0  # weight = exp(-rate · (loss / best loss - 1))
    half_life: float = 72.0  # of losses
    prior: float = 3.0  # initial leads of equal loss for every member
    gain: float = 0.3  # of the offsets: share of the outcomes' spread per lead

    def __post_init__(self) -> None:
        if not 0.5 < self.quantile < 1:
            raise ValueError(f"MixtureConfig.quantile: got {self.quantile}; expected a number in (0.5, 1)")
        for name in ("rate", "half_life", "prior", "gain"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"MixtureConfig.{name}: got {getattr(self, name)}; expected a number above 0"
                )


@dataclass(frozen=True)
class Mixed:
    """One forecast of y for each run: quantiles [B], and the members' weights [M, B]."""

    p50: Floats
    p90: Floats
    weights: Floats


@dataclass(frozen=True)
class _Made:
    """The forecasts from an origin, kept until the outcome is known."""

    raw: Floats  # [M, B]
    offset: Floats  # [M, B] at that time
    mixed: Floats  # [B] before its own offset
    level: Floats  # [B]


class Mixture:
    """`step` forecasts from one origin; `learn` updates with the outcome of the oldest open origin."""

    def __init__(
        self, members: int, runs: int = 1, lead: int = 10, config: MixtureConfig | None = None
    ) -> None:
        self.config = config or MixtureConfig()
        self._offset = np.zeros((members, runs))
        self._final = np.zeros(runs)
        self._spread = np.full(runs, 0.05)
        self._loss = np.full((members, runs), 1e-3)
        self._seen = self.config.prior * lead
        self._decay = 0.5 ** (1 / (self.config.half_life * lead))
        self._gain = self.config.gain / lead
        self._open: deque[_Made] = deque()

    def weights(self) -> Floats:
        """[M, B], summing to 1 over the members."""
        best = self._loss.min(axis=0)
        score = np.exp(-self.config.rate * (self._loss / np.maximum(best, 1e-15) - 1))
        return np.asarray(score / score.sum(axis=0), dtype=np.float64)

    def step(self, p50: Floats, p90: Floats, level: Floats) -> Mixed:
        """The mixture of members' quantiles [M, B] of y; relative to the load `level` [B]."""
        weights = self.weights()
        mixed = (weights * (p90 + self._offset)).sum(axis=0)
        self._open.append(_Made(p90, self._offset.copy(), mixed, level))
        return Mixed((weights * p50).sum(axis=0), mixed + self._final, weights)

    def learn(self, y: Floats) -> None:
        """Update from the outcome [B] of the oldest open origin."""
        made, q = self._open.popleft(), self.config.quantile
        miss = y - (made.raw + made.offset)
        loss = np.maximum(q * miss, (q - 1) * miss) * made.level
        self._seen += 1
        share = max(1 - self._decay, 1 / self._seen)
        self._loss += share * (loss - self._loss)
        self._spread += share * (np.abs(y) - self._spread)
        move = self._gain * np.maximum(self._spread, 1e-3)
        self._offset += move * ((y > made.raw + self._offset) - (1 - q))
        self._final += move * ((y > made.mixed + self._final) - (1 - q))
