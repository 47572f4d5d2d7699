"""Forecasters by name, and as members of the short-term mixture.

`fit` is called occasionally; `quantiles` forecasts from any origins of a later history, possibly thousands
at once. Neither uses data after an origin. Shapes: see `history`; o = origins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from farthing_fleet.forecast.base import DAY_S, AbsoluteAR, Floats, Forecaster, LastValue, Seasonal, Series
from farthing_fleet.forecast.day import DayForecaster, ProphetConfig
from farthing_fleet.forecast.growth import (
    PRIOR,
    REFRESH_S,
    WINDOW_S,
    History,
    growth_bound,
    point_forecast,
    running_quantile,
)
from farthing_fleet.forecast.profile import ProfileAR, ProfileConfig

QUANTILES = (0.5, 0.9)
PRETRAINED = Path(__file__).parent / "pretrained.safetensors"  # weights of the learned members


class Member(Protocol):
    """A forecaster of the mixture."""

    name: str

    def fit(self, history: History) -> None:
        """Fit on a history; called on the level's schedule."""
        ...

    def quantiles(self, history: History, first: int) -> Floats:
        """[o, B, 2] y at 0.5 and 0.9 for the origins from `first` to the end of `history`."""
        ...


@dataclass(frozen=True)
class LSTMConfig:
    """Settings of the fine-tuning of `lstm.LSTM`, which needs torch."""

    epochs: int = 4
    batch: int = 256
    learning_rate: float = 1e-3
    least_leads: int = 72  # with less history the packaged networks are not changed
    thin: int = 2  # train on every `thin`-th origin

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "least_leads", "thin"):
            if getattr(self, name) < 1:
                raise ValueError(f"LSTMConfig.{name}: got {getattr(self, name)}; expected 1 or more")


class LastValueMember:
    """The current level, widened by running quantiles of what followed earlier levels."""

    name = "last-value"

    def __init__(self, pace: float = 1.0) -> None:
        self.pace = pace

    def fit(self, history: History) -> None:
        """No-op."""

    def quantiles(self, history: History, first: int) -> Floats:
        prior, window_s, refresh_s = np.log(PRIOR), self.pace * WINDOW_S, self.pace * REFRESH_S
        seen = np.full((history.lead, history.load.shape[1]), prior)
        past = np.concatenate([seen, history.target]) if len(history) > history.lead else seen
        past = past[: len(history)]
        levels = [running_quantile(past, history.step_s, q, window_s, prior, refresh_s) for q in QUANTILES]
        return np.stack(levels, axis=-1)[first:]


class Growth:
    """The bound of `growth`: a model-free point forecast times the running growth."""

    name = "growth"

    def __init__(self, pace: float = 1.0) -> None:
        self.pace = pace

    def fit(self, history: History) -> None:
        """No-op."""

    def quantiles(self, history: History, first: int) -> Floats:
        step_s, lead_s = history.step_s, history.lead_s
        point = point_forecast(history.load, history.level, step_s, lead_s, self.pace)
        bound = growth_bound(history.level, point, step_s, lead_s, self.pace)
        logs = np.log(np.stack([point, np.maximum(point, bound)], axis=-1) / history.level[..., None])
        return np.asarray(logs[first:], dtype=np.float64)


class Regression:
    """Linear quantile regression on the features, regularized towards the packaged weights.

    Fitted by iteratively reweighted least squares on the first run's history.
    """

    name = "regression"

    def __init__(
        self, start: Floats, centre: Floats, spread: Floats, penalty: float = 1000.0, thin: int = 3
    ) -> None:
        self._start, self._centre, self._spread = start, centre, spread  # [2, F + 1], [F], [F]
        self.weights, self.penalty, self.thin = start.copy(), penalty, thin

    def fit(self, history: History) -> None:
        past = len(history) - history.lead
        if past < 10 * history.lead:
            return
        chosen = slice(0, past, self.thin)
        rows = self._rows(history.features[chosen, 0])
        truth, level = history.target[:: self.thin, 0], history.level[chosen, 0]
        importance = level / float(level.mean())
        self.weights = np.stack(
            [
                quantile_fit(rows, truth, importance, q, self._start[i], self.penalty)
                for i, q in enumerate(QUANTILES)
            ]
        )

    def quantiles(self, history: History, first: int) -> Floats:
        predicted = self._rows(history.features[first:]) @ self.weights.T
        return np.asarray(np.maximum.accumulate(predicted, axis=-1), dtype=np.float64)

    def _rows(self, features: Floats) -> Floats:
        scaled = (features - self._centre) / self._spread
        return np.concatenate([scaled, np.ones((*scaled.shape[:-1], 1))], axis=-1)


def quantile_fit(
    rows: Floats,
    truth: Floats,
    importance: Floats,
    quantile: float,
    start: Floats,
    penalty: float,
    iterations: int = 15,
) -> Floats:
    """Weights [F] with the least weighted pinball loss of `rows` [R, F] @ weights against `truth` [R].

    `penalty` regularizes them towards `start`.
    """
    weights, ridge = start.copy(), penalty * np.eye(len(start))
    for _ in range(iterations):
        miss = truth - rows @ weights
        weight = np.where(miss >= 0, quantile, 1 - quantile) / np.maximum(np.abs(miss), 3e-3) * importance
        scaled = rows * weight[:, None]
        solved = np.linalg.solve(scaled.T @ rows + ridge, scaled.T @ truth + ridge @ start)
        weights = np.asarray(solved, dtype=np.float64)
    return weights


class Blocks:
    """A path forecaster (`ar`, `profile`) as a member: forecasts the next block's mean.

    A block is one lead long. The mixture's calibration turns the mean into a 0.9 quantile. With several runs,
    the first run's forecast relative to its level is used for all.
    """

    def __init__(self, forecaster: Forecaster, name: str) -> None:
        self.forecaster, self.name = forecaster, name
        self._first = 0  # number of the first known block
        self._means: Floats = np.empty(0)
        self._fitted = False
        self._following: dict[int, float] = {}  # block -> forecast of the next one

    def fit(self, history: History) -> None:
        self._first, self._means, self._following = -(-history.start // history.lead), np.empty(0), {}
        self._extend(history)
        self._fitted = len(self._means) >= 2
        if self._fitted:
            self.forecaster.fit(Series(0.0, history.lead * history.step_s, self._means))

    def quantiles(self, history: History, first: int) -> Floats:
        self._extend(history)
        ratio = np.zeros(len(history) - first)
        if self._fitted:
            for row in range(len(ratio)):
                block = (history.start + first + row + 1) // history.lead - 1  # the last complete one
                ratio[row] = np.log(self._next(block) / history.level[first + row, 0])
        return np.broadcast_to(ratio[:, None, None], (len(ratio), history.load.shape[1], 2))

    def _next(self, block: int) -> float:
        if block not in self._following:
            past = self._means[: max(1, block - self._first + 1)]
            self._following[block] = max(float(self.forecaster.predict(past, 1)[0]), 1e-9)
        return self._following[block]

    def _extend(self, history: History) -> None:
        """Add the new complete blocks of `history`."""
        lead, following = history.lead, self._first + len(self._means)
        begin, end = following * lead - history.start, len(history)
        count = (end - begin) // lead
        if begin >= 0 and count > 0:
            rows = history.load[begin : begin + count * lead, 0].reshape(-1, lead)
            self._means = np.asarray(np.append(self._means, rows.mean(axis=1)), dtype=np.float64)


# Forecasters by name.

PATHS = ("naive", "seasonal", "seasonal-week", "ar", "profile", "prophet", "day")


def make(model: str, country: str | None = None) -> Forecaster:
    """A forecaster by name. Raises ValueError with the known names."""
    if model in ("naive", "last-value"):
        return LastValue()
    if model == "seasonal":
        return Seasonal(DAY_S)
    if model == "seasonal-week":
        return Seasonal(7 * DAY_S)
    if model == "ar":
        return AbsoluteAR()
    if model == "profile":
        return ProfileAR(ProfileConfig(country=country))
    if model in ("prophet", "day"):
        return DayForecaster(ProphetConfig(country=country), blend=model == "day")
    raise ValueError(f"model {model!r}: expected one of {', '.join(PATHS)}")
