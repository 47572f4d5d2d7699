"""Learned forecasters, each a rule of its own: `policy.rule: lstm`, `regression` or `prophet`.

They forecast the load's peak within a lead: `lstm` and `regression` from the last hours, ten minutes and more
ahead, `prophet` from the seasons of day and week. They train twice a day on the load that this service
recorded. None is part of the default, because none saves it hours that count
(docs/lab/learned-forecasts.md), and neither torch nor pandas is loaded unless one is chosen.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import numpy as np

from farthing.extras import how_to_install
from farthing_fleet.forecast.base import DAY_S, Floats
from farthing_fleet.forecast.history import History
from farthing_fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing_fleet.forecast.recent import Mean
from farthing_fleet.rehearsal import Plan

NEEDS = {"lstm": "torch", "regression": "torch", "prophet": "prophet"}  # forecaster -> module
GRID_S = 60.0
TRAIN_S = DAY_S / 2
WEEKS_S = 14 * DAY_S  # older loads are ignored
_REACH = 146  # leads before an origin that the features use


class Learned(Protocol):
    """A forecaster of the load's peak within a lead, on minutes."""

    def fit(self, loads: Floats) -> None:
        """Train on the loads known so far [n]."""
        ...

    def plans(self, loads: Floats, count: int) -> Floats:
        """[count] the loads to plan for at the last `count` minutes of `loads`; uses nothing later."""
        ...


class Neural:
    """The LSTM or the quantile regression of `forecast.lstm`, on features of the recent load."""

    def __init__(self, name: str, lead_s: float) -> None:
        from farthing_fleet.forecast.lstm import Pretrained  # imports torch

        shipped = Pretrained.read()
        self._model = shipped.lstm() if name == "lstm" else shipped.regression()
        self._lead_s = max(lead_s, GRID_S)

    def fit(self, loads: Floats) -> None:
        self._model.fit(History(loads, GRID_S, self._lead_s))

    def plans(self, loads: Floats, count: int) -> Floats:
        history = History(loads, GRID_S, self._lead_s)
        history = history.tail(count + _REACH * history.lead)
        upper = self._model.quantiles(history, len(history) - count)[:, 1]
        return np.asarray(history.level[-count:] * np.exp(upper), dtype=np.float64)


class Seasonal:
    """The peak of Prophet's path within the next lead, and at least the load of the last minute."""

    def __init__(self, lead_s: float, start: float, config: ProphetConfig | None = None) -> None:
        self._prophet = ProphetForecaster(config)
        self._ahead = max(1, round(lead_s / GRID_S)) + 1
        self._start = start  # time of the first load
        self._path: Floats = np.zeros(0)
        self._fitted = 0

    def fit(self, loads: Floats) -> None:
        every = round(1800 / GRID_S)
        if len(loads) * GRID_S < 2 * DAY_S:
            return
        skip = len(loads) % every  # the oldest, so that the end stays
        coarse = loads[skip:].reshape(-1, every).mean(axis=1)
        self._prophet.fit(self._start + skip * GRID_S, GRID_S * every, coarse)
        path = self._prophet.predict(round(2 * DAY_S / 1800))
        at = np.arange(len(path) * every)
        self._path = np.interp(at, np.arange(len(path)) * every + every / 2, path)
        self._fitted = len(loads)

    def plans(self, loads: Floats, count: int) -> Floats:
        last = loads[-count:]
        first = len(loads) - count - self._fitted
        if not len(self._path) or first < 0:
            return last
        rows = np.minimum(first + np.arange(count)[:, None] + np.arange(self._ahead), len(self._path) - 1)
        return np.asarray(np.maximum(self._path[rows].max(axis=1), last), dtype=np.float64)


def make(name: str, lead_s: float, start: float, config: ProphetConfig | None = None) -> Learned:
    """A forecaster by name; `start` is the time of the first load.

    Raises ValueError with the known names, or if its library is not installed.
    """
    check_installed(name)
    return Seasonal(lead_s, start, config) if name == "prophet" else Neural(name, lead_s)


def check_installed(name: str) -> None:
    """Raises ValueError for an unknown forecaster and for one whose library is missing."""
    if name not in NEEDS:
        raise ValueError(f"forecaster {name!r}: expected one of {', '.join(NEEDS)}")
    if find_spec(NEEDS[name]) is None:
        extra = "torch" if NEEDS[name] == "torch" else "fleet"
        raise ValueError(f"{name} needs {NEEDS[name]}: {how_to_install(extra)}; or choose another rule")


def walk(forecaster: Learned, loads: Floats) -> Floats:
    """[n] plans for every minute, trained every `TRAIN_S` on what was known; NaN before the first."""
    every, plans = round(TRAIN_S / GRID_S), np.full(len(loads), np.nan)
    for begin in range(every, len(loads), every):
        forecaster.fit(loads[:begin])
        end = min(len(loads), begin + every)
        plans[begin:end] = forecaster.plans(loads[:end], end - begin)
    return plans


class ForecastRule:
    """What a forecaster alone wants: its load at a fixed utilization. The interface of `Rehearsal`."""

    def __init__(self, name: str, step_s: float, utilization: float) -> None:
        self._name, self._margin = name, 1 / utilization
        self._minute = Mean(max(1, round(GRID_S / step_s)))
        self._expected: float | None = None

    def expect(self, load: float | None) -> None:
        """Set the forecast, in replicas; None: there is none, and the last minute counts."""
        self._expected = load

    def observe(self, load: float) -> Plan:
        """The plan after a step with this mean load."""
        now = self._minute.add(load)
        planned = max(now, self._expected or 0.0)
        told = self._name if self._expected is not None else f"{self._name} (no forecast yet)"
        return Plan(need=planned * self._margin, load=planned, now=now, margin=self._margin, rule=told)
