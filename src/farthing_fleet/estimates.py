"""Estimates that the controller maintains: forecasts of the load and the capacity of a replica.

`load.csv` in the state directory has the load per minute, so that a restarted controller knows the past. With
a Prometheus server, the controller queries it for the load that it did not observe itself.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from farthing.files import read
from farthing_fleet.capacity import OnlineCapacity, Targets
from farthing_fleet.config import FleetConfig
from farthing_fleet.forecast.base import DAY_S, Array, Forecast, Series
from farthing_fleet.forecast.day import DayForecaster, FloorShare, ProphetConfig
from farthing_fleet.forecast.growth import TINY
from farthing_fleet.forecast.short import GRID_S, ShortConfig, ShortTerm
from farthing_fleet.types import Snapshot

log = logging.getLogger(__name__)

PLAN_STEP_S = 300.0
FIT_STEP_S = 1800.0  # the plan is fitted on means of this length
SOURCE = "prophet"
PLAN_DAYS = 2  # forecast at each fit, so that the plan reaches a day ahead until the next fit
KEEP_DAYS = 120
LEAD_CHANGE = 1.2  # the short-term level follows the measured lead when it differs by this factor,
LEAD_CHANGE_S = 3600.0  # at most this often
_FRESH_S = 15.0  # short-term forecasts of the same step are cached for at most this long


class DayPlan:
    """The mid-term level: `DayForecaster`, fitted once a day, for every five minutes of the next 24 hours.

    If its running error exceeds that of the last value (the load when the plan was made), the last value is
    used instead. The floor is the share of the plan that was worth its price (`forecast.floor`), judged
    against `bound`, the short-term bound at a time.
    """

    def __init__(
        self,
        config: ProphetConfig | None = None,
        refit_s: float = DAY_S,
        lead_s: float = 600.0,
        utilization: float = 0.7,
        bound: Callable[[float], float | None] = lambda now: None,
    ) -> None:
        self._forecaster = DayForecaster(config)
        self._refit_s = refit_s
        self._bound = bound
        self._loads: deque[float] = deque(maxlen=round(KEEP_DAYS * DAY_S / PLAN_STEP_S))
        self._start: float | None = None  # of the current step
        self._open: list[float] = []
        self._plan: Forecast | None = None
        self._tried: float | None = None
        self._at_plan = 0.0  # the load when the plan was made
        self._errors: deque[tuple[float, float]] = deque(maxlen=round(DAY_S / PLAN_STEP_S))
        self._lead = max(1, math.ceil(lead_s / PLAN_STEP_S))  # steps
        self._pending: deque[tuple[float, float, float]] = deque()  # (due, planned, bounded peak)
        self.floor = FloorShare(round(7 * DAY_S / PLAN_STEP_S), utilization)

    def observe(self, now: float, load: float) -> None:
        """Add a load sample; steps without a sample are interpolated."""
        start = now - now % PLAN_STEP_S
        if self._start is None or start < self._start or start - self._start > KEEP_DAYS * DAY_S:
            self._start, self._open = start, []
            self._pending.clear()
        while start > self._start:
            value = float(np.mean(self._open)) if self._open else load
            self._loads.append(value)
            self._start += PLAN_STEP_S
            self._judge(self._start, value)
            self._open = []
        self._open.append(load)

    def _judge(self, end: float, truth: float) -> None:
        """Score the plan for a step that ended with `truth`, and whether its floor was worth its price."""
        plan = self._plan
        if plan is None:
            return
        planned = plan.peak(end - PLAN_STEP_S, end - PLAN_STEP_S, 0.5)
        if planned is not None:
            self._errors.append((abs(planned - truth), abs(self._at_plan - truth)))
        while self._pending and self._pending[0][0] <= end:
            _, planned_peak, bound_then = self._pending.popleft()
            self.floor.learn(planned_peak, bound_then, max(list(self._loads)[-self._lead :]))
        ahead = self._lead * PLAN_STEP_S
        bound, peak = self._bound(end), plan.peak(end, end + ahead, 0.5)
        if bound is not None and peak is not None:
            self._pending.append((end + ahead, peak, bound))

    @property
    def skill(self) -> float | None:
        """1 - error of the plan / error of the last value over a day; None before an hour of errors."""
        if len(self._errors) < 3600 / PLAN_STEP_S:
            return None
        plan, last = (sum(part) for part in zip(*self._errors, strict=True))
        return 1 - plan / last if last > 0 else 0.0

    def refit(self, now: float) -> bool:
        """Fit if due and two days are known; takes seconds. Returns whether it fitted."""
        due = self._tried is None or abs(now - self._tried) >= self._refit_s
        if not due or self._start is None or len(self._loads) * PLAN_STEP_S < 2 * DAY_S:
            return False
        self._tried = now
        values = np.array(list(self._loads))
        history = Series(self._start - PLAN_STEP_S * len(values), PLAN_STEP_S, values, "load")
        coarse = history.coarse(round(FIT_STEP_S / PLAN_STEP_S))
        self._forecaster.fit(coarse)
        paths = self._forecaster.quantiles(coarse.values, round(PLAN_DAYS * DAY_S / FIT_STEP_S))
        p50, p90 = (_refined(path) for path in paths)
        self._at_plan = float(values[-1])
        choice = self._forecaster.choice.name
        self._plan = Forecast(self._start, PLAN_STEP_S, p50, p90, SOURCE if choice == "blend" else choice)
        share = self.floor.settle()
        log.info(
            "day plan: fitted on %.1f days, floor %.0f %%", len(values) * PLAN_STEP_S / DAY_S, 100 * share
        )
        return True

    def forecast(self, now: float) -> Forecast | None:
        """The floor from `now` on; None before the first fit and after the plan's end."""
        plan = self._plan
        if plan is None or not plan.start <= now < plan.end:
            return None
        first = int((now - plan.start) // PLAN_STEP_S)
        last = first + round(DAY_S / PLAN_STEP_S)
        start, skill, share = plan.start + first * PLAN_STEP_S, self.skill, self.floor.share
        if skill is not None and skill < 0:
            load = self._loads[-1]
            note = f"{plan.source} replaced by last-value: running skill {skill:.2f}"
            return Forecast(start, PLAN_STEP_S, (load,), (load,), "last-value", skill, note)
        p50, p90 = (tuple(share * load for load in path[first:last]) for path in (plan.p50, plan.p90))
        source = plan.source if share == 1 else f"{share:.0%} of {plan.source}"
        return Forecast(start, PLAN_STEP_S, p50, p90, source, skill)


def _refined(path: Array) -> tuple[float, ...]:
    """Interpolate a path from the grid of the fit to the grid of the plan, between step centers."""
    factor = round(FIT_STEP_S / PLAN_STEP_S)
    middles = np.arange(len(path)) * factor + (factor - 1) / 2
    fine = np.interp(np.arange(len(path) * factor), middles, path)
    return tuple(np.where(fine > TINY, fine, 0.0).tolist())


class LiveEstimates:
    """Feeds forecasters and capacity model with every snapshot, and records the load per minute."""

    def __init__(self, config: FleetConfig) -> None:
        self._policy = policy = config.policy
        self._unit = policy.unit
        targets = Targets(policy.latency_threshold_s, policy.slo.ttft_s, policy.slo.tpot_s)
        self._capacity = OnlineCapacity(policy.capacity, policy.unit, targets)
        self._lead = lead = policy.cold_start_s + policy.interval_s
        self._lead_changed = -float("inf")
        self._meanwhile: list[tuple[float, float]] | None = None  # observed while the level is replaced
        settings = forecast_settings(config.forecast)
        self._short = ShortTerm(replace(settings[0], lead_s=lead))
        self._plan = DayPlan(
            settings[1], lead_s=lead, utilization=policy.target_utilization, bound=self._short_bound
        )
        self._path = config.state / "load.csv"
        self._last: Snapshot | None = None
        self._minute: list[float] = []
        self._open_minute = 0.0
        self._minute_start: float | None = None
        self._cached: tuple[float, Forecast | None] = (-float("inf"), None)
        loads = read_loads(self._path)
        for time, load in loads:
            self._learn(time, load, recent=time > loads[-1][0] - self._short.reach_s)

    # ---- input ----

    def remember(self, points: list[tuple[float, float]]) -> None:
        """Add past loads (time, load), oldest first, after the last recorded one."""
        latest = self._minute_start or -float("inf")
        for time, load in points:
            if time > latest and np.isfinite(load) and load >= 0:
                self._learn(time, load)
                append_load(self._path, time, load)

    @property
    def remembers_until(self) -> float | None:
        """Time of the last recorded load."""
        return self._minute_start

    def _learn(self, time: float, load: float, *, recent: bool = True) -> None:
        if recent:
            self._short.observe(time, load)
            if self._meanwhile is not None:
                self._meanwhile.append((time, load))
        self._plan.observe(time, load)
        self._minute_start = time

    def observe(self, now: float, snapshot: Snapshot) -> None:
        self._capacity.observe(snapshot, self._completed(snapshot))
        self._last = snapshot
        if snapshot.cold_start_s is not None:
            self._lead = self._policy.lead_s(snapshot.cold_start_s) + self._policy.interval_s
        load = snapshot.load(self._unit)
        if load is None or snapshot.stale or snapshot.ready is None or not np.isfinite(load) or load < 0:
            return
        self._learn(now, load)
        self._keep(now, load)

    def _keep(self, now: float, load: float) -> None:
        """Write the mean of each complete minute."""
        minute = now // GRID_S
        if self._minute and minute != self._open_minute:
            append_load(self._path, self._open_minute * GRID_S, float(np.mean(self._minute)))
            self._minute = []
        self._open_minute = minute
        self._minute.append(load)

    def _completed(self, snapshot: Snapshot) -> float | None:
        """Load completed per second: arrivals minus the growth of the queue."""
        last, load = self._last, snapshot.load(self._unit)
        if last is None or load is None or last.backlog is None or snapshot.backlog is None:
            return None
        passed = snapshot.time - last.time
        if passed <= 0 or self._unit != "requests":
            return None
        return max(0.0, load - (snapshot.backlog - last.backlog) / passed)

    # ---- output ----

    def short(self, now: float) -> Forecast | None:
        origin, forecast = self._cached
        if not 0 <= now - origin < min(_FRESH_S, self._short.config.grid_s):
            forecast = self._short.forecast(now)
            self._cached = (now, forecast)
        return replace(forecast, start=now) if forecast is not None else None

    def _short_bound(self, now: float) -> float | None:
        forecast = self.short(now)
        return forecast.p90[0] if forecast is not None else None

    def mid(self, now: float) -> Forecast | None:
        return self._plan.forecast(now)

    def capacity(self) -> float | None:
        return self._capacity.estimate

    def maintain(self, now: float) -> None:
        """Follow the measured cold start, train the LSTM and fit Prophet, each if due."""
        self._follow_lead(now)
        self._short.retrain(now)
        self._plan.refit(now)

    def _follow_lead(self, now: float) -> None:
        """Forecast over the measured cold start and one interval, if that differs much from the present lead.

        The new level is calibrated on the known history before it replaces the present one: on the recorded
        loads before those that the present one keeps, which are few if its steps are short.
        """
        used, lead = self._short.config.lead_s, self._lead
        if max(lead, used) <= LEAD_CHANGE * min(lead, used) or abs(now - self._lead_changed) < LEAD_CHANGE_S:
            return
        self._lead_changed, self._meanwhile = now, []
        kept = self._short.known
        first = kept[0][0] if kept else math.inf
        forecaster = self._short.over(lead, [p for p in read_loads(self._path) if p[0] < first] + kept)
        while self._meanwhile:
            forecaster.observe(*self._meanwhile.pop(0))
        self._short, self._meanwhile, self._cached = forecaster, None, (-float("inf"), None)
        log.info("short-term forecasts cover %.0f s (before: %.0f s)", lead, used)


def forecast_settings(data: dict[str, Any]) -> tuple[ShortConfig, ProphetConfig]:
    """The `forecast` section: `short` (its model) and `prophet` (country, events). Raises ValueError."""
    unknown = set(data) - {"short", "prophet"}
    if unknown:
        raise ValueError(f"forecast.{sorted(unknown)[0]}: unknown field; expected short or prophet")
    return (
        read(ShortConfig, data.get("short", {}), "forecast.short"),
        read(ProphetConfig, data.get("prophet", {}), "forecast.prophet"),
    )


def append_load(path: Path, time: float, load: float) -> None:
    """Append one line to the load file. With a full disk the line is lost and forecasts continue."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time:.0f},{load:.6g}\n")
    except OSError as problem:
        log.warning("%s: %s; the load of this minute is not recorded", path, problem.strerror)


def read_loads(path: Path) -> list[tuple[float, float]]:
    """[(time, load)] of a load file, ordered by time. Skips partial lines.

    Empty if there is no file.
    """
    points = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            time, _, load = line.partition(",")
            try:
                points.append((float(time), float(load)))
            except ValueError:
                log.warning("%s: skipping line %r", path, line[:40])
    return sorted(points)


def make_estimates(config: FleetConfig) -> LiveEstimates:
    """The estimates of a configuration. Raises ValueError if its `forecast` section is invalid."""
    config.state.mkdir(parents=True, exist_ok=True)
    return LiveEstimates(config)
