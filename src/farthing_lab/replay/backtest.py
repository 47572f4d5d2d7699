"""Rolling-origin backtests: fit on the past, forecast, compare, advance. Never uses future data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from farthing_fleet.forecast.base import DAY_S, Floats, Forecaster, LastValue, Seasonal, Series
from farthing_fleet.forecast.growth import History
from farthing_fleet.forecast.members import PATHS
from farthing_fleet.forecast.short import SHORT_MODELS, ShortConfig, walk

# Upper quantiles from past errors by adaptive conformal inference (Gibbs and Candès 2021).


class Conformal:
    """The `target` quantile of the outcome above a point forecast, relative to it, per step ahead.

    After every outcome the level moves by `rate`, so that the share of outcomes at or below the bound tends
    to `target` even if the errors drift.
    """

    def __init__(self, target: float = 0.9, window: int = 500, rate: float = 0.01) -> None:
        if not 0.5 <= target < 1:
            raise ValueError(f"Conformal.target: got {target}; expected a number in [0.5, 1)")
        self.target, self.rate = target, rate
        self._level = target
        self._errors: deque[Floats] = deque(maxlen=window)

    def bound(self, point: Floats) -> Floats:
        """[steps] upper quantile for the point forecast [steps]; the point itself before any error."""
        if not self._errors:
            return point
        errors = np.stack(list(self._errors))
        ratio = np.quantile(errors, self._level, axis=0)
        return np.asarray(np.maximum(point * (1 + ratio), 0.0), dtype=np.float64)

    def learn(self, point: Floats, bound: Floats, truth: Floats) -> None:
        """Update from the outcome of a forecast; all [steps]."""
        if self._errors:
            covered = float((truth <= bound).mean())
            self._level = min(max(self._level + self.rate * (self.target - covered), 0.5), 1.0)
        self._errors.append((truth - point) / np.maximum(point, 1e-9))


MODELS = (*PATHS, *(name for name in SHORT_MODELS if name not in PATHS))
Progress = Callable[[str], None]
_ROUNDING = 1e-9  # errors below this share of the load are rounding
UNDEFINED = {  # why a figure of a report is None
    "wape": "the load is 0",
    "mape": "the load is 0",
    "pinball": "the load is 0",
    "skill_vs_last": "the last value's error is 0, or rounding only",
    "skill_vs_seasonal": "the seasonal forecast's error is 0, or rounding only",
}


def parse_horizon(text: str) -> float:
    """Seconds of "600s", "10m", "24h", "1d" or plain seconds. Raises ValueError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError as error:
        raise ValueError(f"horizon {text!r}: expected a time such as 600s, 10m, 24h or 1d") from error
    if not value > 0:
        raise ValueError(f"horizon {text!r}: expected more than 0 s")
    return value


@dataclass(frozen=True)
class Backtest:
    """Settings of a backtest: begin (share of the series), refit interval, calibration."""

    begin: float = 0.5
    refit_s: float = DAY_S
    calibrate_steps: int = 250  # origins before `begin` whose errors initialize the quantiles
    quantile: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.begin < 1:
            raise ValueError(f"Backtest.begin: got {self.begin}; expected a share in (0, 1)")


def backtest(
    series: Series,
    forecaster: Forecaster,
    horizon_s: float,
    plan: Backtest | None = None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Errors of the forecasts for every step of the horizon, with origins one horizon apart.

    Returns wape and mape in percent (mape over values above 1 % of the mean), coverage of the 0.9 quantile in
    percent, skills in percent against the last value and the best seasonal naive, and the mean time of a fit
    in seconds. What would divide by zero is None (`UNDEFINED`): a skill against a reference without errors
    (other than rounding).
    """
    plan = plan or Backtest()
    steps = max(1, round(horizon_s / series.step_s))
    begin = round(plan.begin * len(series))
    if begin + steps > len(series) or begin < 2:
        raise ValueError(
            f"{series.name}: {len(series)} steps are too few to backtest {steps} steps from {plan.begin:.0%}"
        )
    calibration = min(plan.calibrate_steps, begin // 4 // steps)
    origins = range(begin - calibration * steps, len(series) - steps + 1, steps)
    rivals: list[Forecaster] = [LastValue(), Seasonal(DAY_S), Seasonal(7 * DAY_S)]
    refit = max(1, round(plan.refit_s / series.step_s))
    # a day's path is one update with many errors, and updates are few: use a larger step
    conformal = Conformal(plan.quantile, rate=0.01 if steps == 1 else 0.05)
    errors: list[Floats] = []
    covered: list[float] = []
    truths: list[Floats] = []
    fit_seconds: list[float] = []
    fitted = -refit
    for origin in origins:
        if origin - fitted >= refit:
            started = time.perf_counter()
            for model in (forecaster, *rivals):
                model.fit(series.head(origin))
            fit_seconds.append(time.perf_counter() - started)
            fitted = origin
            progress(f"origin {origin} of {len(series)}")
        past, truth = series.values[:origin], series.values[origin : origin + steps]
        point = forecaster.predict(past, steps)
        bound = conformal.bound(point)
        conformal.learn(point, bound, truth)
        if origin < begin:
            continue
        errors.append(np.stack([point - truth, *(rival.predict(past, steps) - truth for rival in rivals)]))
        covered.append(float((truth <= bound).mean()))
        truths.append(truth)
    return _report(np.concatenate(truths), np.abs(np.concatenate(errors, axis=1)), covered, fit_seconds)


def _report(truth: Floats, errors: Floats, covered: list[float], fit_seconds: list[float]) -> dict[str, Any]:
    total = errors.sum(axis=1)
    large = truth > 0.01 * truth.mean()
    return {
        "wape": _percent(total[0], truth.sum()),
        "mape": 100 * float((errors[0][large] / truth[large]).mean()) if large.any() else None,
        "coverage": 100 * float(np.mean(covered)),
        "skill_vs_last": _skill(total[0], total[1], truth.sum()),
        "skill_vs_seasonal": _skill(total[0], total[2:].min(), truth.sum()),
        "fit_seconds": float(np.mean(fit_seconds)),
        "origins": len(covered),
        "steps": len(truth) // max(1, len(covered)),
    }


def _percent(part: float, whole: float) -> float | None:
    return 100 * float(part / whole) if whole > 0 else None


def _skill(error: float, reference: float, scale: float) -> float | None:
    """Percent by which `error` is below the reference's, if that is more than the rounding of `scale`."""
    return 100 * float(1 - error / reference) if reference > _ROUNDING * scale else None


def backtest_short(
    series: Series, config: ShortConfig, horizon_s: float, plan: Backtest | None = None
) -> dict[str, Any]:
    """Run the short-term level over the series as in production, forecasting the peak within the horizon.

    One step of the series is one minute; with a horizon of one step the peak is the next value. Returns the
    metrics of `backtest`, the coverage of the level's own 0.9 quantile, its pinball loss in percent of the
    mean load, and the members' mean weights.
    """
    plan = plan or Backtest()
    steps, begin = max(1, round(horizon_s / series.step_s)), round(plan.begin * len(series))
    if begin + steps > len(series) or begin < 2:
        raise ValueError(
            f"{series.name}: {len(series)} steps are too few for a backtest from {plan.begin:.0%}"
        )
    history = History(series.values[:, None], series.step_s, steps * series.step_s)
    started = time.perf_counter()
    made, names = walk(history, config)
    seconds = time.perf_counter() - started
    origins = np.arange(begin - 1, len(series) - steps)
    truth = np.array([series.values[o + 1 : o + 1 + steps].max() for o in origins])
    rivals = [series.values[origins]]
    for period in (series.per_day, 7 * series.per_day):
        past = origins + 1 - period
        before = [series.values[p : p + steps].max() if p >= 0 else np.nan for p in past]
        rivals.append(np.where(np.isnan(before), series.values[origins], before))
    point, bound = made.p50[origins, 0], made.p90[origins, 0]
    errors = np.abs(np.stack([point - truth, *(rival - truth for rival in rivals)]))
    covered = (truth <= bound).astype(np.float64)
    miss = truth - bound
    pinball = np.maximum(plan.quantile * miss, (plan.quantile - 1) * miss)
    weights = made.weights[origins, :, 0].mean(axis=0)
    return {
        **_report(truth, errors, covered.tolist(), [seconds]),
        "pinball": _percent(pinball.mean(), truth.mean()),
        "weights": dict(zip(names, weights.round(3).tolist(), strict=True)),
    }
