"""Scaling rules over lanes: the controller's policy, and the short rules that it has to beat.

Shapes: T = ticks, B = lanes. `load` is the trailing 60 s rate at each tick, as a metrics server reports it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from farthing_fleet.config import PolicyConfig
from farthing_fleet.forecast.history import trailing_mean
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Rehearsal, Settings
from farthing_fleet.types import Snapshot
from farthing_lab.replay.rate import View
from farthing_lab.replay.trace import Floats, Ints


def needed(load: Floats, utilization: Floats | float, capacity: float) -> Ints:
    """ceil(load / (u·C)); [T, B] or [B]."""
    return np.ceil(load / (utilization * capacity) - 1e-9).astype(np.int64)


class FarthingRule:
    """The controller's policy: one `Policy` and one `Rehearsal` per lane.

    `seen` [T, B] is the mean load of the tick before each tick.
    """

    def __init__(self, seen: Floats, config: PolicyConfig) -> None:
        self._seen, self._config = seen, config
        tick_s, capacity = config.interval_s, config.capacity
        first = seen[: max(1, round(300 / tick_s))].mean(axis=0) / capacity  # a running service
        settings = Settings.of(config)
        self.rehearsals = [Rehearsal(settings, float(load)) for load in first]
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
        plan = self.rehearsals[lane].observe(load / self._config.capacity)
        self._rules[plan.rule] += 1
        snapshot = Snapshot(
            time=view.now,
            current=int(view.current[lane]),
            ready=int(view.ready[lane]),
            request_rate=plan.now * self._config.capacity,
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
