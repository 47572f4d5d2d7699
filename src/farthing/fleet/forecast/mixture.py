"""A mixture of quantile forecasts: members calibrated, weighted by pinball loss, and the sum calibrated too.

Every member's 0.9 quantile gets an offset, adjusted after each outcome (online gradient descent on the
pinball loss: Angelopoulos, Candès and Tibshirani 2023), so that it covers 90 % whatever its errors. Weights
decay exponentially with the excess of the loss, in units of the load, over the best member's, relative to how
much the members' losses differ at a time; losses decay over days. The medians have weights of their own, by
absolute error.

Nothing is learned while there is hardly any load: forecasts are relative to the current load, so those made
in a gap of the traffic mean nothing after it.

Shapes: M = members, B = runs side by side.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from farthing.fleet.forecast.base import Floats

_HIGHEST = 4.0  # logarithm


@dataclass(frozen=True)
class MixtureConfig:
    """Speed of weights and offsets; times in leads (one cold start plus one interval)."""

    quantile: float = 0.9
    rate: float = 4.0  # weight = exp(-rate · (loss - best loss) / mean difference of the losses)
    half_life: float = 72.0  # of losses
    prior: float = 3.0  # initial leads of equal loss for every member
    gain: float = 0.3  # of the offsets: share of the outcomes' spread per lead
    least: float = 0.1  # outcomes after a load below this times the mean load are not learned

    def __post_init__(self) -> None:
        if not 0.5 < self.quantile < 1:
            raise ValueError(f"MixtureConfig.quantile: got {self.quantile}; expected a number in (0.5, 1)")
        if not 0 <= self.least < 1:
            raise ValueError(f"MixtureConfig.least: got {self.least}; expected a number in [0, 1)")
        for name in ("rate", "half_life", "prior", "gain"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"MixtureConfig.{name}: got {getattr(self, name)}; expected a number above 0"
                )


@dataclass(frozen=True)
class Mixed:
    """One forecast of y for each run: quantiles [B], and the members' weights [M, B] for the upper one."""

    p50: Floats
    p90: Floats
    weights: Floats


@dataclass(frozen=True)
class _Made:
    """The forecasts from an origin, kept until the outcome is known."""

    middle: Floats  # [M, B] medians
    raw: Floats  # [M, B]
    offset: Floats  # [M, B] at that time
    mixed: Floats  # [B] before its own offset
    level: Floats  # [B]


class _Scores:
    """Decayed losses of the members [M, B], and how much they differ at a time [B]."""

    def __init__(self, members: int, runs: int, rate: float) -> None:
        self._rate = rate
        self._loss = np.zeros((members, runs))
        self._apart = np.zeros(runs)

    def learn(self, loss: Floats, share: Floats) -> None:
        self._loss += share * (loss - self._loss)
        apart = np.abs(loss - loss.mean(axis=0)).mean(axis=0)
        self._apart += share * (apart - self._apart)

    def weights(self) -> Floats:
        """[M, B], summing to 1 over the members."""
        excess = (self._loss - self._loss.min(axis=0)) / np.maximum(self._apart, 1e-15)
        score = np.exp(-self._rate * excess)
        return np.asarray(score / score.sum(axis=0), dtype=np.float64)


class Mixture:
    """`step` forecasts from one origin; `learn` updates with the outcome of the oldest open origin."""

    def __init__(
        self, members: int, runs: int = 1, lead: int = 10, config: MixtureConfig | None = None
    ) -> None:
        self.config = config or MixtureConfig()
        self._offset = np.zeros((members, runs))
        self._final = np.zeros(runs)
        self._spread = np.full(runs, 0.05)
        self._upper = _Scores(members, runs, self.config.rate)
        self._middle = _Scores(members, runs, self.config.rate)
        self._level = np.zeros(runs)  # mean load
        self._outcomes = 0
        self._seen = np.full(runs, self.config.prior * lead)  # learned outcomes
        self._decay = 0.5 ** (1 / (self.config.half_life * lead))
        self._gain = self.config.gain / lead
        self._open: deque[_Made] = deque()

    def weights(self) -> Floats:
        """[M, B] of the upper quantiles, summing to 1 over the members."""
        return self._upper.weights()

    def step(self, p50: Floats, p90: Floats, level: Floats) -> Mixed:
        """The mixture of members' quantiles [M, B] of y; relative to the load `level` [B]."""
        weights = self.weights()
        mixed = (weights * (p90 + self._offset)).sum(axis=0)
        self._open.append(_Made(p50, p90, self._offset.copy(), mixed, level))
        return Mixed((self._middle.weights() * p50).sum(axis=0), mixed + self._final, weights)

    def learn(self, y: Floats) -> None:
        """Update from the outcome [B] of the oldest open origin."""
        made, q = self._open.popleft(), self.config.quantile
        self._outcomes += 1
        self._level += max(1 - self._decay, 1 / self._outcomes) * (made.level - self._level)
        live = made.level >= self.config.least * self._level
        self._seen += live
        share = live * np.maximum(1 - self._decay, 1 / self._seen)
        miss = _load(y, made) - _load(made.raw + made.offset, made)
        self._upper.learn(np.maximum(q * miss, (q - 1) * miss), share)
        self._middle.learn(np.abs(_load(y, made) - _load(made.middle, made)), share)
        self._spread += share * (np.abs(y) - self._spread)
        move = live * self._gain * np.maximum(self._spread, 1e-3)
        self._offset += move * ((y > made.raw + self._offset) - (1 - q))
        self._final += move * ((y > made.mixed + self._final) - (1 - q))


def _load(y: Floats, made: _Made) -> Floats:
    """The load that a forecast of y means; limited, since y of a vanishing load may be huge."""
    return np.asarray(made.level * np.exp(np.minimum(y, _HIGHEST)), dtype=np.float64)
