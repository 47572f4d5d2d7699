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

from farthing.fleet.forecast.base import Floats
from farthing.fleet.forecast.curve import Forecast
from farthing.fleet.forecast.growth import GrowthConfig, ceiling, returning
from farthing.fleet.forecast.history import TINY, History, memory
from farthing.fleet.forecast.members import PRETRAINED, Blocks, Growth, LastValue, LSTMConfig, Member
from farthing.fleet.forecast.mixture import Mixture, MixtureConfig
from farthing.fleet.forecast.names import make
from farthing.fleet.series import DAY_S

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
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    pretrained: Path = PRETRAINED

    def __post_init__(self) -> None:
        known = (*MIXTURE, *BLOCKS)
        if self.model not in SHORT_MODELS:
            raise ValueError(
                f"forecast.short.model: got {self.model!r}; expected one of {', '.join(SHORT_MODELS)}"
            )
        if not self.members or not set(self.members) <= set(known):
            raise ValueError(
                f"forecast.short.members: got {self.members}; expected some of {', '.join(known)}"
            )

    @property
    def grid_s(self) -> float:
        """Seconds per step: a minute, or a sixth of a lead that is shorter than a minute."""
        return GRID_S if self.lead_s >= GRID_S else max(1.0, self.lead_s / 6)

    @property
    def pace(self) -> GrowthConfig:
        """The growth settings for this lead."""
        return self.growth if self.lead_s >= GRID_S else self.growth.paced(self.lead_s)

    @property
    def names(self) -> tuple[str, ...]:
        return self.members if self.model == "mixture" else (self.model,)


def make_members(config: ShortConfig) -> list[Member]:
    """The configured members. Raises FileNotFoundError if the packaged weights are missing."""
    learned = {"lstm", "lstm-shipped", "regression"} & set(config.names)
    shipped = None
    if learned:
        from farthing.fleet.forecast.lstm import Pretrained  # imports torch

        shipped = Pretrained.read(config.pretrained)
    made: list[Member] = []
    for name in config.names:
        if name in BLOCKS:
            made.append(Blocks(make(name), name))
        elif name == "growth":
            made.append(Growth(config.pace))
        elif name == "last-value":
            made.append(LastValue(config.pace))
        else:
            assert shipped is not None
            made.append(
                shipped.regression()
                if name == "regression"
                else shipped.lstm(config.lstm, tune=name == "lstm")
            )
    return made


@dataclass(frozen=True)
class Advanced:
    """Forecasts from several origins: median and 0.9 bound of the load [o, B], members' weights [o, M, B]."""

    p50: Floats
    p90: Floats
    weights: Floats


class ShortLevel:
    """Members and their mixture over `runs` parallel runs."""

    def __init__(self, members: Sequence[Member], runs: int, lead: int, config: MixtureConfig) -> None:
        self.members = list(members)
        self._mixture = Mixture(len(self.members), runs, lead, config)
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
        made = np.stack([member.quantiles(history, first) for member in self.members])  # [M, o, B, 2]
        count, lead, level = len(history) - first, history.lead, history.level
        p50, p90 = (np.empty((count, level.shape[1])) for _ in range(2))
        weights = np.empty((count, len(self.members), level.shape[1]))
        for row in range(count):
            origin = first + row
            if self._open == lead:
                self._mixture.learn(history.target[origin - lead])
                self._open -= 1
            mixed = self._mixture.step(made[:, row, :, 0], made[:, row, :, 1], level[origin])
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
    level, step_s, config = history.level, history.step_s, history.growth
    if config.ceiling > 0:
        highest = ceiling(level, step_s, config)[-len(bound) :]
        bound = np.minimum(bound, np.maximum(highest, level[-len(bound) :]))
    back = returning(level, step_s, history.lead_s, config)[-len(bound) :]
    return np.asarray(np.maximum(bound, back), dtype=np.float64)


def reach(history: History) -> int:
    """Number of steps before an origin that some member uses."""
    return max(memory(history), round(2 * DAY_S / history.step_s)) + history.lead


def walk(history: History, config: ShortConfig) -> tuple[Advanced, list[str]]:
    """Run the level over a whole history as in production. Returns its forecasts and the members' names.

    It retrains every `retrain_s` on the first run, using only data known at that time.
    """
    runs = history.load.shape[1]
    level = ShortLevel(make_members(config), runs, history.lead, config.mixture)
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
        made = list(members) if members is not None else make_members(self.config)
        self._grid = self.config.grid_s
        lead = max(1, round(self.config.lead_s / self._grid))
        self.level = ShortLevel(made, 1, lead, self.config.mixture)
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

    def over(self, lead_s: float, known: Sequence[tuple[float, float]]) -> ShortTerm:
        """The level over another lead, calibrated on the `known` loads (time, load); takes seconds."""
        made = ShortTerm(replace(self.config, lead_s=lead_s))
        for time, load in known:
            if time > known[-1][0] - made.reach_s:
                made.observe(time, load)
        made._advance()
        return made

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
