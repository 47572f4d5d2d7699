"""Scaling policies over lanes: Farthing's (the rule of `fleet.policy`, tested against it) and others'.

Shapes: T = ticks, B = lanes. `load` is the trailing 60 s rate at each tick, as a metrics server would report.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from farthing_fleet.config import SloConfig
from farthing_fleet.forecast.base import Floats
from farthing_fleet.forecast.growth import trailing_max
from farthing_lab.replay.rate import Ints, View


def whole(need: Floats) -> Ints:
    """Whole replicas for a need: the ceiling, tolerant of rounding errors."""
    return np.ceil(need - 1e-9).astype(np.int64)


def needed(load: Floats, utilization: Floats | float, capacity: float) -> Ints:
    """ceil(load / (u·C)); [T, B] or [B]."""
    return whole(load / (utilization * capacity))


@dataclass
class FarthingRule:
    """`fleet.policy.Policy` for many lanes: the maximum of the levels, up immediately, down by the rule.

    `planned` [T, B] is the maximum of the forecast levels and the current load; backlog, latency and the
    SLO's utilization follow from the queue.
    """

    planned: Floats  # [T, B]
    load: Floats  # [T, B]
    utilization: Floats  # [B], the initial one if the SLO adjusts it
    capacity: float
    lead_s: float
    tick_s: float
    scale_down_below: float = 0.6
    scale_up_above: float = 1.0
    scale_down_spare: float = 0.0
    stabilization_s: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1_000_000
    realtime: bool = True
    drain_s: float = 60.0
    drains_fast: bool = True  # within drain_s at the target utilization, else within a cold start
    latency_threshold_s: float = 0.2
    latency_for_s: float = 30.0
    latency_factor: float = 1.5
    slo: SloConfig | None = None

    def __post_init__(self) -> None:
        lanes = self.planned.shape[1]
        self.u = np.broadcast_to(np.asarray(self.utilization, dtype=np.float64), (lanes,)).copy()
        self.start: Ints = np.maximum(self.min_replicas, needed(self.planned[0], self.u, self.capacity))
        self._breach = np.full(lanes, np.inf)  # start of the current breach
        self._step_time = np.full(lanes, -np.inf)
        self._step_target = np.zeros(lanes, np.int64)
        self._recent: deque[Floats] = deque(maxlen=int(self.stabilization_s // self.tick_s) + 1)
        self._calm = True  # no lane has a breach or an active step
        self._excused_until = np.full(lanes, -np.inf)
        self._reach = self._reachable() if self.slo is not None else self.planned

    def _reachable(self) -> Floats:
        """[T, B] load above which requests are late whatever the utilization; see `fleet.jumps`."""
        assert self.slo is not None
        lead, window = math.ceil(self.lead_s / self.tick_s) + 1, int(self.stabilization_s // self.tick_s) + 1
        largest = trailing_max(self.planned, min(window, len(self.planned))) / self.slo.lowest
        unknown = np.full((min(lead, len(largest)), largest.shape[1]), np.inf)
        least = self.min_replicas * self.capacity
        return np.concatenate([unknown, np.maximum(largest, least)])[: len(largest)]

    def decide(self, view: View) -> Ints:
        if self.slo is not None:
            self._follow_slo(view, self.slo)
        need = self.planned[view.tick] / (self.u * self.capacity)
        if self.realtime and (not self._calm or view.backlog.any()):
            need = np.maximum(need, self._from_queue(view))
        above = whole(need - self.scale_up_above * view.current) > 0
        target = np.where(above, whole(need), self._down(need, view))
        return np.asarray(np.clip(target, self.min_replicas, self.max_replicas), dtype=np.int64)

    def _down(self, need: Floats, view: View) -> Ints:
        """[B] the current replicas, or fewer where the rule allows that."""
        largest, current = need, view.current
        if self.stabilization_s > 0:
            self._recent.append(need)
            largest = np.maximum.reduce(list(self._recent))
        if view.now < self.stabilization_s:  # no scale-down before a whole window
            return current
        wanted = whole(largest)
        fits = whole(largest * (1 + self.scale_down_spare)) < current
        if self.scale_down_below < 1:
            fits &= wanted < self.scale_down_below * current
        return np.where(fits, wanted, current)

    def _follow_slo(self, view: View, slo: SloConfig) -> None:
        jump = self.load[view.tick] > self._reach[view.tick]
        end = view.now + self.lead_s + self.tick_s + self.drain_s
        self._excused_until = np.where(jump, end, self._excused_until)
        if view.tick > 0:
            moved = slo.moved(self.u, view.late, self.tick_s)
            self.u = np.where(view.now <= self._excused_until, self.u, moved)

    def _from_queue(self, view: View) -> Floats:
        drain = self.drain_s if self.drains_fast else max(self.drain_s, self.lead_s)
        utilization = self.u if self.drains_fast else 1.0
        load = self.load[view.tick] + view.backlog / drain
        need = np.where(view.backlog > 0, load / (utilization * self.capacity), 0.0)
        breached = view.wait > self.latency_threshold_s
        self._breach = np.where(breached, np.minimum(self._breach, view.now), np.inf)
        stepped = view.now - self._step_time < self.lead_s
        lasting = view.now - self._breach >= self.latency_for_s  # False without a breach
        step = lasting & ~stepped
        self._step_time = np.where(step, view.now, self._step_time)
        raised = np.ceil(self.latency_factor * np.maximum(1, view.ready) - 1e-9).astype(np.int64)
        self._step_target = np.where(step, raised, self._step_target)
        active = stepped | step
        self._calm = not bool(breached.any() or active.any())
        return np.asarray(np.maximum(need, np.where(active, self._step_target, 0)), dtype=np.float64)


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
    """A fixed schedule of replicas [T, B]: static provisioning, or the oracle's demand."""

    plan: Ints

    def __post_init__(self) -> None:
        self.start: Ints = self.plan[0]

    def decide(self, view: View) -> Ints:
        return np.asarray(self.plan[view.tick], dtype=np.int64)
