"""The mid-term level in a replay: a day plan, made every day from past data only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from farthing.fleet.forecast.day import DayForecaster
from farthing.fleet.forecast.floor import best_share, floor_losses
from farthing.fleet.forecast.growth import Floats, trailing_max
from farthing.fleet.forecast.prophet import ProphetConfig
from farthing.fleet.series import DAY_S, Series

JUDGED_S = 300.0  # interval of judged peaks
MOST_DAYS = 7  # between fits


@dataclass(frozen=True)
class PlanConfig:
    """Settings of the day plan and of its judgement."""

    enabled: bool = True
    history_s: float = 7 * DAY_S  # no plan before this: the load replaces it
    max_fits: int = 40  # a long trace is refitted only every few days
    judged_s: float = 7 * DAY_S  # window of the running skill and of the floor's share
    utilization: float = 0.7  # target utilization of the replicas
    prophet: ProphetConfig = field(default_factory=ProphetConfig)


def day_plan(
    series: Series, load: Floats, bound: Floats, tick_s: float, lead_s: float, config: PlanConfig
) -> Floats:
    """[T] the floor at each tick: a share of the plan's peak over the next `lead_s`; NaN without a plan.

    `load` and `bound` [T] are the load and the short-term bound at each tick. As in production, a plan is not
    used while its running skill against the last value known when it was made is below zero.
    """
    if not config.enabled:
        return np.full(len(load), np.nan)
    value, good = _plans(series, config)
    ahead = max(1, int(np.ceil(lead_s / series.step_s)) + 1)
    peak = trailing_max(value[::-1, None], ahead)[::-1, 0]  # over the next steps
    at = np.minimum(np.floor(np.arange(len(load)) * tick_s / series.step_s).astype(np.int64), len(series) - 1)
    planned = np.where(good, peak, np.nan)[at]
    floor: Floats = planned * _shares(planned, load, bound, tick_s, lead_s, config)
    return floor


def _shares(
    planned: Floats, load: Floats, bound: Floats, tick_s: float, lead_s: float, config: PlanConfig
) -> Floats:
    """[T] the floor's share of the plan, chosen every day from previous days."""
    lead, every = max(1, round(lead_s / tick_s)), max(1, round(JUDGED_S / tick_s))
    day, window = round(DAY_S / tick_s), round(config.judged_s / tick_s)
    peaks = trailing_max(load[:, None], lead)[:, 0]
    out = np.ones(len(load))
    for begin in range(0, len(load), day):
        judged = np.arange(max(0, begin - window), max(0, begin - lead), every)
        judged = judged[~np.isnan(planned[judged])]
        losses = floor_losses(planned[judged], bound[judged], peaks[judged + lead], config.utilization)
        out[begin : begin + day] = best_share(losses)
    return out


def _plans(series: Series, config: PlanConfig) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """([steps] planned values, [steps] whether there is a plan with skill)."""
    first, day = round(config.history_s / series.step_s), series.per_day
    value, naive = series.values.copy(), series.values.copy()
    good = np.zeros(len(series), dtype=np.bool_)
    window = round(config.judged_s / series.step_s)
    every = min(MOST_DAYS, max(1, -(-round((len(series) - first) / day) // config.max_fits)))
    forecaster = DayForecaster(config.prophet)
    for count, begin in enumerate(range(first, len(series) - 1, day)):
        end = min(len(series), begin + day)
        if count % every == 0:
            forecaster.fit(series.head(begin))
        value[begin:end] = forecaster.predict(series.values[:begin], end - begin)
        naive[begin:end] = series.values[begin - 1]
        past = slice(max(first, begin - window), begin)
        truth = series.values[past]
        good[begin:end] = np.abs(value[past] - truth).sum() <= np.abs(naive[past] - truth).sum()
    return value, good
