"""Scaling rules over lanes: the controller's policy with each of its rules, and the short rules to beat.

Shapes: T = ticks, B = lanes. `load` is the trailing 60 s rate at each tick, as a metrics server reports it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from farthing_fleet.config import PolicyConfig
from farthing_fleet.forecast.history import trailing_mean
from farthing_fleet.forecast.learned import GRID_S, NEEDS, ForecastRule, make, walk
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Plan, Rehearsal, Settings
from farthing_fleet.types import Snapshot
from farthing_lab.replay.rate import View
from farthing_lab.replay.trace import Floats, Ints


def needed(load: Floats, utilization: Floats | float, capacity: float) -> Ints:
    """ceil(load / (u·C)); [T, B] or [B]."""
    return np.ceil(load / (utilization * capacity) - 1e-9).astype(np.int64)


class Planned(Protocol):
    """What makes a policy's plans, as in the controller."""

    def observe(self, load: float) -> Plan: ...


class Told:
    """A chosen forecaster: at each tick it expects what it was asked at the last full minute."""

    def __init__(self, seen: Floats, config: PolicyConfig) -> None:
        self._rule = ForecastRule(config.rule, config.interval_s, config.target_utilization)
        self._every = max(1, round(GRID_S / config.interval_s))
        ticks = seen[1:]  # of the tick before the first nothing is known
        minutes = ticks[: len(ticks) // self._every * self._every].reshape(-1, self._every).mean(axis=1)
        forecaster = make(config.rule, config.lead_s(None) + config.interval_s, 0.0)
        self._expected = walk(forecaster, minutes) / config.capacity
        self._tick = 0

    def observe(self, load: float) -> Plan:
        minute = self._tick // self._every - 1
        self._tick += 1
        expected = float(self._expected[minute]) if 0 <= minute < len(self._expected) else math.nan
        self._rule.expect(None if math.isnan(expected) else expected)
        return self._rule.observe(load)


def planned(seen: Floats, config: PolicyConfig) -> Planned | None:
    """The plans of one lane [T] for the policy's rule; None for a rule without any."""
    if config.rule == "published":
        return None
    if config.rule in NEEDS:
        return Told(seen, config)
    few = seen[: max(1, round(300 / config.interval_s))]  # a running service
    return Rehearsal(Settings.of(config), float(few.mean()) / config.capacity)


class FarthingRule:
    """The controller's policy: one `Policy` per lane, and what makes its plans.

    `seen` [T, B] is the mean load of the tick before each tick.
    """

    def __init__(self, seen: Floats, config: PolicyConfig) -> None:
        self._seen, self._config = seen, config
        tick_s, capacity = config.interval_s, config.capacity
        first = seen[: max(1, round(300 / tick_s))].mean(axis=0) / capacity  # a running service
        self._rate = trailing_mean(seen, round(60 / tick_s))
        self._plans = [planned(lane, config) for lane in seen.T]
        self._policies = [Policy(config) for _ in first]
        start = np.ceil(1.25 * first - 1e-9).astype(np.int64)
        self.start: Ints = np.clip(start, config.min_replicas, config.max_replicas)
        self._rules: Counter[str] = Counter()

    def rules(self) -> dict[str, float]:
        """Share of the time in which each rule was chosen, most used first."""
        total = max(1, self._rules.total())
        return {rule: round(count / total, 3) for rule, count in self._rules.most_common()}

    def decide(self, view: View) -> Ints:
        targets = [self._one(view, lane) for lane in range(len(self._policies))]
        return np.array(targets, dtype=np.int64)

    def _one(self, view: View, lane: int) -> int:
        load = float(self._seen[view.tick, lane])
        rule = self._plans[lane]
        plan = rule.observe(load / self._config.capacity) if rule is not None else None
        if plan is not None:
            self._rules[plan.rule] += 1
        snapshot = Snapshot(
            time=view.now,
            current=int(view.current[lane]),
            ready=int(view.ready[lane]),
            request_rate=plan.now * self._config.capacity if plan else float(self._rate[view.tick, lane]),
            backlog=float(view.backlog[lane]),
            queue_time_s=float(view.wait[lane]),
        )
        return self._policies[lane].decide(view.now, snapshot, plan).target


@dataclass
class HpaRule:
    """The Kubernetes HPA v2 on an external rate metric (AverageValue): tolerance, sync period, stabilization.

    Defaults are the controller's: tolerance 0.1, scale-up by the larger of 100 % and 4 pods per 15 s,
    scale-down to the largest recommendation of 300 s. `poll_s` is the age of the metric (KEDA polls every 30
    s). With `backlog_s` above 0, the metric includes the backlog, to be processed in that time.
    """

    load: Floats  # [T, B]
    utilization: Floats | float
    capacity: float
    tick_s: float
    tolerance: float = 0.1
    window_s: float = 300.0
    poll_s: float = 15.0
    backlog_s: float = 0.0

    def __post_init__(self) -> None:
        self.start: Ints = np.maximum(1, needed(self.load[0], self.utilization, self.capacity))
        self._recent: deque[Ints] = deque(maxlen=int(self.window_s // self.tick_s) + 1)
        self._metric: Floats = self.load[0]

    def decide(self, view: View) -> Ints:
        if view.now % self.poll_s < self.tick_s:
            extra = view.backlog / self.backlog_s if self.backlog_s > 0 else 0.0
            self._metric = self.load[view.tick] + extra
        ratio = self._metric / (self.utilization * self.capacity)
        steady = np.abs(ratio / np.maximum(view.current, 1) - 1) <= self.tolerance
        wanted = np.where(steady, view.current, np.ceil(ratio - 1e-9)).astype(np.int64)
        self._recent.append(wanted)
        highest = np.maximum.reduce(list(self._recent))
        target = np.where(wanted > view.current, wanted, np.minimum(view.current, highest))
        limit = np.maximum(2 * view.current, view.current + 4)
        return np.asarray(np.maximum(1, np.minimum(target, limit)), dtype=np.int64)


@dataclass
class FixedRule:
    """A schedule of replicas [T, B] that does not depend on the fleet."""

    plan: Ints

    def __post_init__(self) -> None:
        self.start: Ints = self.plan[0]

    def decide(self, view: View) -> Ints:
        return np.asarray(self.plan[view.tick], dtype=np.int64)


def deviations(load: Floats, steps: int) -> Floats:
    """[T, B] mean and two standard deviations of the last `steps` rows."""
    mean = trailing_mean(load, steps)
    spread = np.sqrt(np.maximum(0.0, trailing_mean(load**2, steps) - mean**2))
    return np.asarray(mean + 2 * spread, dtype=np.float64)
