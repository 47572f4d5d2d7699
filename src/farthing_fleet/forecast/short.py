"""The short-term level: a bound on the peak of the load within one cold start and one interval.

`ShortLevel` is the forecaster: members, their mixture and its calibration, advanced over a history in pieces
of any length. The controller advances it every minute (`ShortTerm`), a replay over days at once, and
`farthing forecast` over the steps of a series, so reported results come from the production code.

Shapes: see `history`; M = members.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from farthing_fleet.forecast.base import DAY_S, Floats, Forecast
from farthing_fleet.forecast.growth import TINY, History, ceiling, memory, pace_of, returning
from farthing_fleet.forecast.members import (
    PRETRAINED,
    Blocks,
    Growth,
    LastValueMember,
    LSTMConfig,
    Member,
    make,
)

_HIGHEST = 4.0  # logarithm

# The speed of the mixture's weights and offsets; times in leads (one cold start plus one interval).
QUANTILE = 0.9
RATE = 4.0  # weight = exp(-rate · (loss - best loss) / mean difference of the losses)
HALF_LIFE = 72.0  # of losses
PRIOR = 3.0  # initial leads of equal loss for every member
GAIN = 0.3  # of the offsets: share of the outcomes' spread per lead
LEAST = 0.1  # outcomes after a load below this times the mean load are not learned


@dataclass(frozen=True)
class Mixed:
    """One forecast of y for each run: quantiles [B], and the members' weights [M, B] for the upper one."""

    p50: Floats
    p90: Floats
    weights: Floats


@dataclass(frozen=True)
class _Forecast:
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
    """`step` forecasts from one origin; `learn` updates with the outcome of the oldest open origin.

    Every member's 0.9 quantile gets an offset, adjusted after each outcome (online gradient descent on the
    pinball loss: Angelopoulos, Candès and Tibshirani 2023), so that it covers 90 % whatever its errors.
    Weights decay exponentially with the excess of the loss, in units of the load, over the best member's,
    relative to how much the members' losses differ at a time; losses decay over days. The medians have
    weights of their own, by absolute error.

    Nothing is learned while there is hardly any load: forecasts are relative to the current load, so those
    made in a gap of the traffic mean nothing after it.

    Shapes: M = members, B = runs side by side.
    """

    def __init__(self, members: int, runs: int = 1, lead: int = 10) -> None:
        self._offset = np.zeros((members, runs))
        self._final = np.zeros(runs)
        self._spread = np.full(runs, 0.05)
        self._upper = _Scores(members, runs, RATE)
        self._middle = _Scores(members, runs, RATE)
        self._level = np.zeros(runs)  # mean load
        self._outcomes = 0
        self._seen = np.full(runs, PRIOR * lead)  # learned outcomes
        self._decay = 0.5 ** (1 / (HALF_LIFE * lead))
        self._gain = GAIN / lead
        self._open: deque[_Forecast] = deque()

    def weights(self) -> Floats:
        """[M, B] of the upper quantiles, summing to 1 over the members."""
        return self._upper.weights()

    def step(self, p50: Floats, p90: Floats, level: Floats) -> Mixed:
        """The mixture of members' quantiles [M, B] of y; relative to the load `level` [B]."""
        weights = self.weights()
        mixed = (weights * (p90 + self._offset)).sum(axis=0)
        self._open.append(_Forecast(p50, p90, self._offset.copy(), mixed, level))
        return Mixed((self._middle.weights() * p50).sum(axis=0), mixed + self._final, weights)

    def learn(self, y: Floats) -> None:
        """Update from the outcome [B] of the oldest open origin."""
        forecast, q = self._open.popleft(), QUANTILE
        self._outcomes += 1
        self._level += max(1 - self._decay, 1 / self._outcomes) * (forecast.level - self._level)
        live = forecast.level >= LEAST * self._level
        self._seen += live
        share = live * np.maximum(1 - self._decay, 1 / self._seen)
        miss = _load(y, forecast) - _load(forecast.raw + forecast.offset, forecast)
        self._upper.learn(np.maximum(q * miss, (q - 1) * miss), share)
        self._middle.learn(np.abs(_load(y, forecast) - _load(forecast.middle, forecast)), share)
        self._spread += share * (np.abs(y) - self._spread)
        move = live * self._gain * np.maximum(self._spread, 1e-3)
        self._offset += move * ((y > forecast.raw + self._offset) - (1 - q))
        self._final += move * ((y > forecast.mixed + self._final) - (1 - q))


def _load(y: Floats, forecast: _Forecast) -> Floats:
    """The load that a forecast of y means; limited, since y of a vanishing load may be huge."""
    return np.asarray(forecast.level * np.exp(np.minimum(y, _HIGHEST)), dtype=np.float64)


log = logging.getLogger(__name__)

GRID_S = 60.0
KEPT = 14 * 24 * 60  # steps of the history
MIXTURE = ("lstm", "lstm-shipped", "regression", "growth", "last-value")
BLOCKS = ("ar", "profile")  # path forecasters that are members on their own
SHORT_MODELS = ("mixture", *MIXTURE, *BLOCKS)


@dataclass(frozen=True)
class ShortConfig:
    """The level's model and training schedule."""

    model: str = "mixture"  # or a single calibrated member
    members: tuple[str, ...] = MIXTURE  # of the mixture
    lead_s: float = 615.0  # one cold start + one interval
    retrain_s: float = 12 * 3600.0
    lstm: LSTMConfig = field(default_factory=LSTMConfig)
    pretrained: Path = PRETRAINED

    def __post_init__(self) -> None:
        names = (*MIXTURE, *BLOCKS)
        if self.model not in SHORT_MODELS:
            raise ValueError(
                f"forecast.short.model: got {self.model!r}; expected one of {', '.join(SHORT_MODELS)}"
            )
        if not self.members or not set(self.members) <= set(names):
            raise ValueError(
                f"forecast.short.members: got {self.members}; expected some of {', '.join(names)}"
            )

    @property
    def grid_s(self) -> float:
        """Seconds per step: a minute, or a sixth of a lead that is shorter than a minute."""
        return GRID_S if self.lead_s >= GRID_S else max(1.0, self.lead_s / 6)

    @property
    def pace(self) -> float:
        """The factor of the windows of growth for this lead."""
        return 1.0 if self.lead_s >= GRID_S else pace_of(self.lead_s)

    @property
    def names(self) -> tuple[str, ...]:
        return self.members if self.model == "mixture" else (self.model,)


def make_members(config: ShortConfig) -> list[Member]:
    """The configured members. Raises FileNotFoundError if the packaged weights are missing."""
    learned = {"lstm", "lstm-shipped", "regression"} & set(config.names)
    shipped = None
    if learned:
        from farthing_fleet.forecast.lstm import Pretrained  # imports torch

        shipped = Pretrained.read(config.pretrained)
    members: list[Member] = []
    for name in config.names:
        if name in BLOCKS:
            members.append(Blocks(make(name), name))
        elif name == "growth":
            members.append(Growth(config.pace))
        elif name == "last-value":
            members.append(LastValueMember(config.pace))
        else:
            assert shipped is not None
            members.append(
                shipped.regression()
                if name == "regression"
                else shipped.lstm(config.lstm, tune=name == "lstm")
            )
    return members


@dataclass(frozen=True)
class Advanced:
    """Forecasts from several origins: median and 0.9 bound of the load [o, B], members' weights [o, M, B]."""

    p50: Floats
    p90: Floats
    weights: Floats


class ShortLevel:
    """Members and their mixture over `runs` parallel runs."""

    def __init__(self, members: Sequence[Member], runs: int, lead: int) -> None:
        self.members = list(members)
        self._mixture = Mixture(len(self.members), runs, lead)
        self._open = 0  # origins without a known outcome

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    def fit(self, history: History) -> None:
        """Fit every member on `history`; takes seconds."""
        for member in self.members:
            member.fit(history)

    def advance(self, history: History, first: int) -> Advanced:
        """Forecast from the origins `first` to the end, each weighted by the outcomes known at that time.

        Origins must be consecutive across calls. `history` must reach back over `memory` and a lead before
        `first`, or to its start.
        """
        quantiles = np.stack([member.quantiles(history, first) for member in self.members])  # [M, o, B, 2]
        count, lead, level = len(history) - first, history.lead, history.level
        p50, p90 = (np.empty((count, level.shape[1])) for _ in range(2))
        weights = np.empty((count, len(self.members), level.shape[1]))
        for row in range(count):
            origin = first + row
            if self._open == lead:
                self._mixture.learn(history.target[origin - lead])
                self._open -= 1
            mixed = self._mixture.step(quantiles[:, row, :, 0], quantiles[:, row, :, 1], level[origin])
            self._open += 1
            base = np.where(level[origin] > TINY, level[origin], 0.0)
            p50[row] = base * np.exp(mixed.p50)
            p90[row] = np.maximum(p50[row], base * np.exp(mixed.p90))
            weights[row] = mixed.weights
        return Advanced(p50, p90, weights)


def capped(bound: Floats, history: History) -> Floats:
    """[o, B] the last origins' bounds for the policy: at most a share of the highest load, and at least the
    load before a collapse.

    Records are rare, and the target utilization leaves headroom for one. The forecast itself, whose coverage
    is measured, is not changed.
    """
    level, step_s = history.level, history.step_s
    highest = ceiling(level, step_s)[-len(bound) :]
    bound = np.minimum(bound, np.maximum(highest, level[-len(bound) :]))
    back = returning(level, step_s, history.lead_s)[-len(bound) :]
    return np.asarray(np.maximum(bound, back), dtype=np.float64)


def reach(history: History) -> int:
    """Number of steps before an origin that some member uses."""
    return max(memory(history), round(2 * DAY_S / history.step_s)) + history.lead


def walk(history: History, config: ShortConfig) -> tuple[Advanced, list[str]]:
    """Run the level over a whole history as in production. Returns its forecasts and the members' names.

    It retrains every `retrain_s` on the first run, using only data known at that time.
    """
    runs = history.load.shape[1]
    level = ShortLevel(make_members(config), runs, history.lead)
    every = max(1, round(config.retrain_s / history.step_s))
    parts = []
    for begin in range(0, len(history), every):
        if begin:
            level.fit(history.head(begin).lane(0).tail(KEPT))
        end = min(len(history), begin + every)
        before = min(begin, reach(history))
        parts.append(level.advance(history.head(end).tail(end - begin + before), before))
    joined = (np.concatenate([getattr(p, name) for p in parts]) for name in ("p50", "p90", "weights"))
    return Advanced(*joined), level.names


class ShortTerm:
    """The level in production: `observe` adds loads, `forecast` queries it.

    Times in seconds. Loads are averaged per step of the grid; gaps are interpolated linearly.
    """

    def __init__(self, config: ShortConfig | None = None, members: Sequence[Member] | None = None) -> None:
        self.config = config or ShortConfig()
        own = list(members) if members is not None else make_members(self.config)
        self._grid = self.config.grid_s
        lead = max(1, round(self.config.lead_s / self._grid))
        self.level = ShortLevel(own, 1, lead)
        self._steps: deque[float] = deque(maxlen=KEPT)
        self._start: float | None = None  # of the current step
        self._filling: list[float] = []
        self._trained: float | None = None
        self._count = 0  # complete steps so far
        self._new = 0  # complete steps not yet passed to the level
        self._last: Advanced | None = None

    @property
    def reach_s(self) -> float:
        """Seconds of the kept history."""
        return KEPT * self._grid

    def over(self, lead_s: float, loads: Sequence[tuple[float, float]]) -> ShortTerm:
        """The level over another lead, calibrated on the `loads` (time, load); takes seconds."""
        copy = ShortTerm(replace(self.config, lead_s=lead_s))
        for time, load in loads:
            if time > loads[-1][0] - copy.reach_s:
                copy.observe(time, load)
        copy._advance()
        return copy

    @property
    def known(self) -> list[tuple[float, float]]:
        """(time, load) of the kept steps."""
        begin = (self._start or 0.0) - len(self._steps) * self._grid
        return [(begin + index * self._grid, load) for index, load in enumerate(list(self._steps))]

    def observe(self, now: float, load: float | None) -> None:
        """Add the load at `now`; ignores None (missing) and times before the last step."""
        if load is None or not np.isfinite(load) or load < 0:
            return
        if self._start is None:
            self._start = now
        if now < self._start:  # the clock went back: continue from here and keep the order of steps
            self._start, self._filling = now, []
        while now >= self._start + self._grid:
            previous = self._steps[-1] if self._steps else load
            self._steps.append(float(np.mean(self._filling)) if self._filling else (previous + load) / 2)
            self._new, self._count = self._new + 1, self._count + 1
            behind = now - self._start
            self._start = now if behind > self.reach_s else self._start + self._grid
            self._filling = []
        self._filling.append(load)

    def retrain(self, now: float) -> bool:
        """Retrain the members if due; takes seconds, so run it in a thread. Returns whether they trained."""
        due = self._trained is None or abs(now - self._trained) >= self.config.retrain_s
        if not due or len(self._steps) < 10 * self.config.lead_s / self._grid:
            return False
        self.level.fit(self._history(len(self._steps)))
        self._trained = now
        log.info("short-term forecasters fitted on %.1f hours", len(self._steps) * self._grid / 3600)
        return True

    def forecast(self, now: float) -> Forecast | None:
        """Median and 0.9 bound of the load's peak over the lead from `now`; None before a complete step."""
        self._advance()
        if self._last is None:
            return None
        recent = self._history(round(2 * DAY_S / self._grid))
        p90 = float(capped(self._last.p90[-1:], recent)[0, 0])
        p50 = min(float(self._last.p50[-1, 0]), p90)
        weights = self._last.weights[-1, :, 0]
        carried = int(np.argmax(weights))
        source = self.level.names[carried]
        return Forecast(now, self.config.lead_s, (p50,), (p90,), source, weight=float(weights[carried]))

    def _advance(self) -> None:
        if not self._new:
            return
        count = min(self._new, len(self._steps))
        full = self._history(len(self._steps))
        before = min(len(full) - count, reach(full))
        self._last = self.level.advance(full.tail(count + before), before)
        self._new = 0

    def _history(self, steps: int) -> History:
        values = np.array(self._steps)[-steps:, None]
        first = self._count - len(values)
        return History(values, self._grid, self.config.lead_s, first, self.config.pace)
