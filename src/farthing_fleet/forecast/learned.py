"""Learned forecasters, admitted where a rehearsal of the recorded weeks says that they save hours.

`trial` replays the load that this service recorded: the forecaster is trained twice a day on what was known
then, its plans join those of `forecast.recent` in a `Rehearsal`, and their cheapest rule is compared with the
cheapest one without them, at the same price of lateness. The controller runs it once a day in a process of
its own (`python -m farthing_fleet.forecast.learned`), so torch and pandas are never resident unless a
forecaster was admitted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from farthing.files import read
from farthing_fleet.forecast.base import DAY_S, Floats
from farthing_fleet.forecast.history import History
from farthing_fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing_fleet.rehearsal import Rehearsal, Settings

NAMES = ("lstm", "regression", "prophet")
GRID_S = 60.0
TRAIN_S = DAY_S / 2
LEAST_S = 3 * DAY_S  # no trial with less
WEEKS_S = 14 * DAY_S  # older loads are ignored
GAIN = 0.01  # share of the cost that an admitted forecaster saves
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
    """A forecaster by name; `start` is the time of the first load. Raises ValueError with the known names."""
    if name not in NAMES:
        raise ValueError(f"forecaster {name!r}: expected one of {', '.join(NAMES)}")
    return Seasonal(lead_s, start, config) if name == "prophet" else Neural(name, lead_s)


def walk(forecaster: Learned, loads: Floats) -> Floats:
    """[n] plans for every minute, trained every `TRAIN_S` on what was known; NaN before the first."""
    every, plans = round(TRAIN_S / GRID_S), np.full(len(loads), np.nan)
    for begin in range(every, len(loads), every):
        forecaster.fit(loads[:begin])
        end = min(len(loads), begin + every)
        plans[begin:end] = forecaster.plans(loads[:end], end - begin)
    return plans


@dataclass(frozen=True)
class Trial:
    """Whether a forecaster pays: the share of the cost that it saves, negative if it costs."""

    name: str
    saved: float

    @property
    def admitted(self) -> bool:
        return self.saved >= GAIN


def trial(name: str, forecaster: Learned, loads: Floats, settings: Settings, capacity: float) -> Trial:
    """Rehearse `loads` [n minutes] with and without the forecaster; the first half is not judged."""
    plans = walk(forecaster, loads) / capacity
    told = replace(settings, step_s=GRID_S, learned=name)
    rehearsal = Rehearsal(told, max(float(loads[0]) / capacity, 0.5))
    for load, plan in zip(loads / capacity, plans, strict=True):
        rehearsal.observe(float(load), None if np.isnan(plan) else float(plan))
    costs = rehearsal.cheapest()
    others = min(cost for plan, cost in costs.items() if plan != name)
    return Trial(name, 1 - min(costs[name], others * 2) / others)


def trials(
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    settings: Settings,
    capacity: float,
    prophet: ProphetConfig | None = None,
) -> list[Trial]:
    """Try forecasters on recorded loads (time, load). Empty with less than `LEAST_S` of them."""
    if len(points) < 2 or points[-1][0] - points[0][0] < LEAST_S:
        return []
    times, values = np.array(points, dtype=np.float64).T
    begin = max(times[0], times[-1] - WEEKS_S)
    loads = np.interp(np.arange(begin, times[-1], GRID_S), times, values)
    made = []
    for name in names:
        try:
            forecaster = make(name, settings.lead_s, float(begin), prophet)
        except ImportError as missing:
            print(f"{name}: not tried, {missing}", file=sys.stderr)
            continue
        made.append(trial(name, forecaster, loads, settings, capacity))
    return made


def main() -> None:
    """Read {"points": …, "settings": …, "capacity": …} from a file; print [{"name": …, "saved": …}]."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    prophet = read(ProphetConfig, task["prophet"], "forecast.prophet")
    done = trials(task["names"], task["points"], Settings(**task["settings"]), task["capacity"], prophet)
    print(json.dumps([{"name": found.name, "saved": found.saved} for found in done]))


if __name__ == "__main__":
    main()
