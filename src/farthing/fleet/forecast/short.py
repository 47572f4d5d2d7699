"""The short-term level in service: an LSTM trained on the recent days, watched, and replaced where it fails.

The load is kept on a grid of one minute. The LSTM forecasts on a grid of `block_s`; its running error
is compared with that of the last value, and while the skill is below zero the last value speaks in its
place, which is said in the forecast's note and so in the decision log. Upper quantiles are the growth
bound of `growth`.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from farthing.fleet.decisions import Forecast
from farthing.fleet.forecast.growth import GrowthConfig, growth_bound, point_forecast, steady_load
from farthing.fleet.forecast.lstm import LSTMConfig, LSTMForecaster
from farthing.fleet.series import DAY_S, Series

log = logging.getLogger(__name__)
GRID_S = 60.0


@dataclass(frozen=True)
class ShortConfig:
    """When the LSTM is trained, and how it is judged."""

    lead_s: float = 615.0  # one cold start + one interval
    block_s: float = 600.0  # the LSTM's grid
    retrain_s: float = 6 * 3600.0
    keep_s: float = 14 * DAY_S  # history that is kept
    skill_window: int = 72  # forecasts whose errors make the running skill
    lstm: LSTMConfig = field(default_factory=LSTMConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    directory: Path | None = None  # where trained versions are saved


class ShortTerm:
    """Feed it loads with `observe`, ask it with `forecast`. Times in seconds; gaps are bridged by a line."""

    def __init__(self, config: ShortConfig | None = None, model: LSTMForecaster | None = None) -> None:
        self.config = config or ShortConfig()
        self.model = model or LSTMForecaster(self.config.lstm)
        self._minutes: deque[float] = deque(maxlen=round(self.config.keep_s / GRID_S))
        self._start: float | None = None  # of the minute that fills now
        self._open: list[float] = []
        self._trained: float | None = None
        self._errors: deque[tuple[float, float]] = deque(maxlen=self.config.skill_window)
        self._pending: deque[tuple[int, float, float]] = (
            deque()
        )  # due minute, LSTM's and last value's forecast
        self._count = 0

    def observe(self, now: float, load: float | None) -> None:
        """Take in the load at `now`; None (missing) and times before the last minute teach nothing."""
        if load is None or not np.isfinite(load) or load < 0:
            return
        if self._start is None:
            self._start = now
        if now < self._start:  # the clock went back: go on from here, the minutes stay in their order
            self._start, self._open = now, []
        while now >= self._start + GRID_S:
            previous = self._minutes[-1] if self._minutes else load
            self._close(float(np.mean(self._open)) if self._open else (previous + load) / 2)
            behind = now - self._start
            self._start = now if behind > self.config.keep_s else self._start + GRID_S
            self._open = []
        self._open.append(load)

    def _close(self, value: float) -> None:
        self._minutes.append(value)
        self._count += 1
        block = round(self.config.block_s / GRID_S)
        while self._pending and self._pending[0][0] <= self._count:
            _, model, last = self._pending.popleft()
            truth = float(np.mean(list(self._minutes)[-block:]))
            self._errors.append((abs(model - truth), abs(last - truth)))
        if self._count % block == 0 and self._trained is not None:
            coarse = self._series().coarse(block)
            self._pending.append(
                (self._count + block, float(self.model.predict(coarse.values, 1)[0]), coarse.values[-1])
            )

    @property
    def skill(self) -> float | None:
        """1 - error of the LSTM / error of the last value over the last forecasts; None below twelve."""
        if len(self._errors) < 12:
            return None
        model, last = (float(np.sum(part)) for part in zip(*self._errors, strict=True))
        return 1 - model / last if last > 0 else 0.0

    def retrain(self, now: float) -> bool:
        """Train if it is due; takes seconds, so a controller calls it beside its loop. True if it trained."""
        block = round(self.config.block_s / GRID_S)
        need = (self.config.lstm.window + self.config.lstm.ahead + self.config.lstm.batch) * block
        due = self._trained is None or abs(now - self._trained) >= self.config.retrain_s
        if not due or len(self._minutes) < need:
            return False
        self.model.fit(self._series().coarse(block))
        self._trained = now
        if self.config.directory is not None:
            log.info("short-term forecaster saved as %s", self.model.save(self.config.directory))
        return True

    def forecast(self, now: float) -> Forecast | None:
        """The load's median and 0.9 bound over the lead, from `now` on; None before the first whole
        minute.
        """
        if not self._minutes:
            return None
        config, minutes = self.config, np.array(self._minutes)[:, None]
        steady = steady_load(minutes, GRID_S, config.growth)
        point = point_forecast(minutes, steady, GRID_S, config.lead_s, config.growth)
        bound = float(growth_bound(steady, point, GRID_S, config.lead_s, config.growth)[-1, 0])
        source, note, p50 = "last-value", "", float(point[-1, 0])
        skill = self.skill
        if skill is not None and skill >= 0:
            coarse = self._series().coarse(round(config.block_s / GRID_S))
            source, p50 = "lstm", float(self.model.predict(coarse.values, 1)[0])
        elif skill is not None:
            note = f"lstm replaced by last-value: running skill {skill:.2f}"
        return Forecast(now, config.lead_s, (p50,), (max(p50, bound),), source, skill, note)

    def _series(self) -> Series:
        start = (self._start or 0.0) - GRID_S * len(self._minutes)
        return Series(start, GRID_S, np.array(self._minutes), "load")
