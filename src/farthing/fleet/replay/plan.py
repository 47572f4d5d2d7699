"""The mid-term level in a replay: a day plan made anew on a schedule, from the past only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from farthing.fleet.forecast.growth import Floats, trailing_max
from farthing.fleet.forecast.prophet import ProphetConfig, ProphetForecaster
from farthing.fleet.series import DAY_S, Series


@dataclass(frozen=True)
class PlanConfig:
    """When the day plan is made, and when it is not used."""

    enabled: bool = True
    history_s: float = 7 * DAY_S  # below this there is no plan: the load itself stands in for it
    max_fits: int = 40  # plans of a long trace are made every few days
    skill_s: float = 7 * DAY_S  # window of the running skill against the last value
    largest_error: float = 0.1  # a plan that was off by more than this share is no floor worth its price
    prophet: ProphetConfig = field(default_factory=ProphetConfig)


def day_plan(series: Series, ticks: int, tick_s: float, lead_s: float, config: PlanConfig) -> Floats:
    """[ticks] the median forecast's peak over the next `lead_s`; NaN where there is no plan to trust.

    A plan whose running skill against the last value known at its making is not above zero, or whose error
    is larger than the configuration allows, is not trusted.
    """
    planned = _plans(series, config) if config.enabled else None
    if planned is None:
        return np.full(ticks, np.nan)
    value, good = planned
    ahead = max(1, int(np.ceil(lead_s / series.step_s)) + 1)
    peak = trailing_max(value[::-1, None], ahead)[::-1, 0]  # over the steps ahead
    at = np.minimum(np.floor(np.arange(ticks) * tick_s / series.step_s).astype(np.int64), len(series) - 1)
    return np.where(good[at], peak[at], np.nan)


def _plans(
    series: Series, config: PlanConfig
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]] | None:
    """([steps] planned values, [steps] whether the plan is trusted); None without enough history."""
    first = round(config.history_s / series.step_s)
    if len(series) - first < series.per_day:
        return None
    days = max(1, -(-round((len(series) - first) / series.per_day) // config.max_fits))
    every = days * series.per_day
    value = series.values.copy()
    naive = series.values.copy()
    good = np.zeros(len(series), dtype=np.bool_)
    window = round(config.skill_s / series.step_s)
    for begin in range(first, len(series), every):
        end = min(len(series), begin + every)
        value[begin:end] = ProphetForecaster(config.prophet).fit(series.head(begin)).predict(end - begin)[0]
        naive[begin:end] = series.values[begin - 1]
        past = slice(max(first, begin - window), begin)
        truth = series.values[past]
        if len(truth):
            error = np.abs(value[past] - truth).sum()
            skilled = error < np.abs(naive[past] - truth).sum()
            good[begin:end] = skilled and error <= config.largest_error * truth.sum()
    return value, good
