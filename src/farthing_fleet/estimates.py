"""Estimates that the controller maintains: the rehearsal of the load and the capacity of a replica.

`load.csv` in the state directory has the load per minute, so that a restarted controller knows the past. With
a Prometheus server, the controller queries it for the load that it did not observe itself.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from farthing.files import read
from farthing_fleet.capacity import OnlineCapacity, Targets
from farthing_fleet.config import FleetConfig
from farthing_fleet.forecast.learned import (
    GRID_S,
    NEEDS,
    TRAIN_S,
    WEEKS_S,
    ForecastRule,
    Learned,
    check_installed,
    make,
)
from farthing_fleet.forecast.prophet import ProphetConfig
from farthing_fleet.rehearsal import Pinned, PinnedRule, Plan, Rehearsal, Settings
from farthing_fleet.types import Snapshot

log = logging.getLogger(__name__)

REHEARSED_STEPS = 3 * 5760  # of the recorded load that a new rehearsal replays: three days of 15 s
LEAD_CHANGE = 1.2  # the rehearsal is repeated when the measured lead differs by this factor,
LEAD_CHANGE_S = 3600.0  # at most this often
TUNED = "tuned.json"  # in the state directory: what `farthing fleet tune` chose, as a `Pinned`
_GAP = 20  # steps without a load after which the present one does not stand for the gap


@dataclass(frozen=True)
class ForecastConfig:
    """The `forecast` section: Prophet's holidays and events."""

    prophet: ProphetConfig = field(default_factory=ProphetConfig)


Rule = Rehearsal | PinnedRule | ForecastRule


@dataclass(frozen=True)
class _Start:
    """What a new rule is made from."""

    load: float  # now
    past: list[float]  # recorded, a minute each
    capacity: float
    cold_start_s: float
    pinned: Pinned


class LiveEstimates:
    """Feeds the rule and the capacity model with every snapshot, and records the load per minute.

    `observe` and `plan` take microseconds. A new rule first follows the recorded load, or a made-up day, for
    seconds; `maintain` does this in another thread, and until then the previous rule decides, or none.
    """

    def __init__(self, config: FleetConfig) -> None:
        self._policy = policy = config.policy
        slo = policy.slo
        targets = Targets(policy.latency_threshold_s, slo.ttft_s, slo.tpot_s, 1 - slo.target)
        self._capacity = OnlineCapacity(policy.capacity, policy.unit, targets, config.signals.window_s)
        self._forecast = read(ForecastConfig, config.forecast, "forecast")
        self._path = config.state / "load.csv"
        self._points = read_loads(self._path)  # (time, load) a minute
        self._cold_start = policy.cold_start_s
        self._lead_changed = -math.inf
        self._tuned = config.state / TUNED
        self._pinned, self._stamp = Pinned(), 0
        self._rule: Rule | None = None
        self._due: _Start | None = None  # the latest rule that was asked for
        self._made: tuple[_Start | None, Rule | None] = (None, None)  # the latest one that was made
        self._since: list[float] | None = None  # the loads since the latest one was asked for, until it rules
        if policy.rule in NEEDS:
            check_installed(policy.rule)
        self._learned: Learned | None = None
        self._learned_plan: tuple[float, float] = (-math.inf, 0.0)  # (time, load)
        self._trained, self._begin = -math.inf, 0.0  # times of the last training, and of its first load
        self._plan: Plan | None = None
        self._last: Snapshot | None = None
        self._minute: list[float] = []
        self._minute_start: float | None = self._points[-1][0] if self._points else None
        self._open_minute = 0.0

    # ---- input ----

    def remember(self, points: list[tuple[float, float]]) -> None:
        """Add past loads (time, load), oldest first, after the last recorded one."""
        for time, load in points:
            if time > (self._minute_start or -math.inf) and np.isfinite(load) and load >= 0:
                self._record(time, load)

    @property
    def remembers_until(self) -> float | None:
        """Time of the last recorded load."""
        return self._minute_start

    def observe(self, now: float, snapshot: Snapshot) -> None:
        """Update from the signals of one step."""
        self._capacity.observe(snapshot)
        last, self._last = self._last, snapshot
        load = snapshot.load(self._policy.unit)
        if load is None or snapshot.stale or snapshot.ready is None or not np.isfinite(load) or load < 0:
            return
        if self._policy.rule != "published":  # it needs no past
            self._renew(now, load, self._policy.lead_s(snapshot.cold_start_s))
            self._follow(now, [load] * self._steps(last, snapshot))
        self._keep(now, load)

    def _renew(self, now: float, load: float, cold_start_s: float) -> None:
        """Ask for another rule where this one is out of date, and take over one that was made."""
        first = self._rule is None and self._since is None
        if self._retuned() or first or self._changed(cold_start_s, now):
            self._cold_start, self._lead_changed = cold_start_s, now
            minutes = REHEARSED_STEPS // max(1, round(GRID_S / self._policy.interval_s))
            past = [value for _, value in self._points[-minutes:]]
            self._due, self._since = (
                _Start(load, past, self._capacity.estimate, cold_start_s, self._pinned),
                [],
            )
            return
        start, made = self._made
        if self._since is not None and start is self._due:
            self._rule, missed, self._since = made, self._since, None
            self._follow(now, missed)

    def _follow(self, now: float, loads: list[float]) -> None:
        """Steps with these loads."""
        if self._since is not None:
            self._since += loads
        if isinstance(self._rule, ForecastRule):
            self._rule.expect(self._learned_load(now))
        for load in loads:
            if self._rule is not None:
                self._plan = self._rule.observe(load / self._capacity.estimate)

    def _changed(self, cold_start_s: float, now: float) -> bool:
        """Whether the measured cold start asks for another rehearsal."""
        used, lead = (s + self._policy.interval_s for s in (self._cold_start, cold_start_s))
        far = max(lead, used) > LEAD_CHANGE * min(lead, used)
        return far and abs(now - self._lead_changed) >= LEAD_CHANGE_S

    def _retuned(self) -> bool:
        """Read what `farthing fleet tune` wrote since. Whether it is another choice; ignores a bad file."""
        try:
            stamp = self._tuned.stat().st_mtime_ns
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            chosen = read(Pinned, json.loads(self._tuned.read_text()), TUNED)
        except FileNotFoundError:
            chosen, self._stamp = Pinned(), 0
        except (OSError, ValueError) as problem:
            log.warning("%s is ignored: %s", self._tuned, problem)
            return False
        changed, self._pinned = chosen != self._pinned, chosen
        if changed:
            log.info("tuned: %s", chosen)
        return changed

    def _steps(self, last: Snapshot | None, snapshot: Snapshot) -> int:
        """Steps of the rehearsal since the last snapshot."""
        if last is None:
            return 1
        passed = round((snapshot.time - last.time) / self._policy.interval_s)
        return max(1, passed) if passed <= _GAP else 1

    def _following(self, start: _Start) -> Rule:
        """A rule that has followed the recorded load."""
        policy, told = self._policy, Settings.of(self._policy, start.cold_start_s)
        first = float(np.mean(start.past[:5])) if start.past else start.load
        made: Rule
        if policy.rule in NEEDS:
            made = ForecastRule(policy.rule, policy.interval_s, policy.target_utilization)
        elif start.pinned != Pinned():
            made = PinnedRule(told, start.pinned)
        else:
            made = Rehearsal(told, first / start.capacity)
        # As long as the past was: a step is shorter than a point of the past, or longer.
        for step in range(math.ceil(len(start.past) * GRID_S / policy.interval_s)):
            made.observe(start.past[int(step * policy.interval_s // GRID_S)] / start.capacity)
        return made

    def _learned_load(self, now: float) -> float | None:
        at, load = self._learned_plan
        return load / self._capacity.estimate if self._learned and now - at <= 3 * GRID_S else None

    def _keep(self, now: float, load: float) -> None:
        """Record the mean of each complete minute."""
        minute = now // GRID_S
        if self._minute and minute != self._open_minute:
            self._record(self._open_minute * GRID_S, float(np.mean(self._minute)))
            self._minute = []
        self._open_minute = minute
        self._minute.append(load)

    def _record(self, time: float, load: float) -> None:
        append_load(self._path, time, load)
        self._points.append((time, load))
        self._minute_start = time
        if len(self._points) > 2 * WEEKS_S / GRID_S:
            del self._points[: round(WEEKS_S / GRID_S)]

    # ---- output ----

    def plan(self, now: float) -> Plan | None:
        """What the weighted rules want now; None before a load."""
        return self._plan

    def capacity(self) -> float | None:
        """Learned capacity of a replica in load units per second."""
        return self._capacity.estimate

    def maintain(self, now: float) -> None:
        """What takes seconds: make a rule that is due, and train a chosen forecaster. Blocks."""
        start = self._due
        if start is not None and start is not self._made[0]:
            self._made = start, self._following(start)
        if self._policy.rule in NEEDS:
            self._forecast_load(now)

    def _forecast_load(self, now: float) -> None:
        """Train the forecaster twice a day, and ask it once a minute."""
        if len(self._points) < 2 or now - self._learned_plan[0] < GRID_S:
            return
        times, values = np.array(self._points).T
        learned = self._learned
        if learned is None or now - self._trained >= TRAIN_S:
            lead_s = self._cold_start + self._policy.interval_s
            self._begin = max(times[0], times[-1] - WEEKS_S)
            learned = make(self._policy.rule, lead_s, self._begin, self._forecast.prophet)
            learned.fit(np.interp(np.arange(self._begin, times[-1] + 1, GRID_S), times, values))
            self._learned, self._trained = learned, now
        loads = np.interp(np.arange(self._begin, times[-1] + 1, GRID_S), times, values)
        self._learned_plan = now, float(learned.plans(loads, 1)[0])


def append_load(path: Path, time: float, load: float) -> None:
    """Append one line to the load file. With a full disk the line is lost and forecasts continue."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time:.0f},{load:.6g}\n")
    except OSError as problem:
        log.warning("%s: %s; the load of this minute is not recorded", path, problem.strerror)


def read_loads(path: Path) -> list[tuple[float, float]]:
    """[(time, load)] of a load file, ordered by time. Skips partial lines, and loads that are none.

    Empty if there is no file.
    """
    points = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            time, _, load = line.partition(",")
            try:
                point = float(time), float(load)
                if not (math.isfinite(sum(point)) and point[1] >= 0):
                    raise ValueError(point)
                points.append(point)
            except ValueError:
                log.warning("%s: skipping line %r", path, line[:40])
    return sorted(points)


def make_estimates(config: FleetConfig) -> LiveEstimates:
    """The estimates of a configuration. Raises ValueError if its `forecast` section is invalid."""
    config.state.mkdir(parents=True, exist_ok=True)
    return LiveEstimates(config)
