"""Rate-level simulation of a fleet: load flows in, replicas drain it, for many runs ("lanes") at once.

Shapes: B = lanes (seeds, or seeds x settings), T = ticks (decisions), S = sub-steps per tick. The queue is a
fluid: within a sub-step load and replicas are constant, so the backlog changes linearly, and the share of
arrivals that wait longer than the SLO is exact. A replica is billed from its launch and serves after the load
time. A removed replica ends immediately if it is still starting; a ready one is billed for `drain_s` more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from farthing_lab.replay.trace import Floats, Ints


@dataclass(frozen=True)
class Setting:
    """The simulated environment, the same for every policy."""

    capacity: float  # load units per second per replica
    load_time_s: float = 600.0  # launch to ready
    tick_s: float = 15.0  # time between decisions
    substeps: int = 3  # per tick
    drain_s: float = 30.0  # a removed ready replica is billed this much longer
    wait_slo_s: float = 2.0

    @property
    def dt(self) -> float:
        return self.tick_s / self.substeps


@dataclass(frozen=True)
class View:
    """The inputs of a policy at a tick; arrays are [B]."""

    tick: int
    now: float
    current: Ints  # launched and not ended: ready plus starting
    ready: Ints
    backlog: Floats  # waiting load units
    wait: Floats  # wait of a request arriving now, seconds

    def lanes(self, part: slice) -> View:
        """The view of some lanes."""
        counts = self.current[part], self.ready[part]
        return View(self.tick, self.now, *counts, self.backlog[part], self.wait[part])


class Rule(Protocol):
    """A policy over lanes. `start` replicas are ready at time 0."""

    start: Ints

    def decide(self, view: View) -> Ints: ...


@dataclass(frozen=True)
class Result:
    """Outcome of each lane [B], and the replicas of lane 0 at every tick [T] for a picture."""

    instance_hours: Floats
    slo: Floats
    changes: Ints
    ready: Ints
    current: Ints


class _Pool:
    """Ready and starting replicas of every lane; starting ones are in a ring buffer by ready tick."""

    def __init__(self, start: Ints, load_ticks: int) -> None:
        self.ready = start.astype(np.int64).copy()
        self.starting = np.zeros_like(self.ready)
        self.ring = np.zeros((max(1, load_ticks), len(start)), np.int64)
        self.instant = load_ticks == 0

    def arrive(self, tick: int) -> None:
        slot = self.ring[tick % len(self.ring)]
        if slot.any():
            self.ready += slot
            self.starting -= slot
            slot[:] = 0

    def launch(self, tick: int, count: Ints) -> None:
        if self.instant:
            self.ready += count
            return
        self.ring[tick % len(self.ring)] += count  # this slot is due after the load time
        self.starting += count

    def take_away(self, tick: int, count: Ints) -> Ints:
        """Remove `count` replicas, newest starting ones first; returns the ready ones removed, [B]."""
        early = np.minimum(count, self.starting)
        for lane in np.flatnonzero(early):
            left = int(early[lane])
            for back in range(len(self.ring)):
                slot = (tick - back) % len(self.ring)
                gone = min(left, int(self.ring[slot, lane]))
                self.ring[slot, lane] -= gone
                left -= gone
                if left == 0:
                    break
        self.starting -= early
        ripe = count - early
        self.ready -= ripe
        return ripe


def simulate(load: Floats, rule: Rule, setting: Setting) -> Result:
    """Run `rule` against `load` [T·S, B] (load units per second), for whole ticks."""
    steps, lanes = load.shape
    ticks = steps // setting.substeps
    load_ticks = round(setting.load_time_s / setting.tick_s)
    pool = _Pool(np.maximum(0, rule.start), load_ticks)
    backlog, good = np.zeros(lanes), np.zeros(lanes)
    billed, drained, changes = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes, np.int64)
    ready0, current0 = np.zeros(ticks, np.int64), np.zeros(ticks, np.int64)
    by_tick = load[: ticks * setting.substeps].reshape(ticks, setting.substeps, lanes)
    peaks, sums = by_tick.max(axis=1), by_tick.sum(axis=1) * setting.dt
    zero = np.zeros(lanes)
    for tick in range(ticks):
        pool.arrive(tick)
        current = pool.ready + pool.starting
        queued = bool(backlog.any())
        wait = backlog / np.maximum(pool.ready * setting.capacity, 1e-9) if queued else zero
        target = rule.decide(View(tick, tick * setting.tick_s, current, pool.ready, backlog, wait))
        delta = target - current
        if delta.any():
            changes += delta != 0
            if (delta < 0).any():
                drained += pool.take_away(tick, np.maximum(-delta, 0)) * setting.drain_s
            if (delta > 0).any():
                pool.launch(tick, np.maximum(delta, 0))
        rate: Floats = pool.ready.astype(np.float64) * setting.capacity
        if not queued and bool((peaks[tick] <= rate).all()):
            good += sums[tick]
        else:
            for step in range(setting.substeps):
                backlog, share = _flow(backlog, by_tick[tick, step], rate, setting)
                good += share * by_tick[tick, step] * setting.dt
        billed += (pool.ready + pool.starting) * setting.tick_s
        ready0[tick], current0[tick] = pool.ready[0], pool.ready[0] + pool.starting[0]
    total = sums.sum(axis=0)
    return Result(
        instance_hours=(billed + drained) / 3600,
        slo=np.where(total > 0, np.minimum(1.0, good / np.maximum(total, 1e-12)), 1.0),
        changes=changes,
        ready=ready0,
        current=current0,
    )


def _flow(backlog: Floats, load: Floats, rate: Floats, setting: Setting) -> tuple[Floats, Floats]:
    """One sub-step of the fluid queue: the new backlog [B] and the share of arrivals within the SLO [B]."""
    after = np.maximum(0.0, backlog + (load - rate) * setting.dt)
    safe = np.maximum(rate, 1e-9)
    first, last = backlog / safe, after / safe
    low, high = np.minimum(first, last), np.maximum(first, last)
    share = np.clip((setting.wait_slo_s - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
    return after, np.where(high <= setting.wait_slo_s, 1.0, np.where(low >= setting.wait_slo_s, 0.0, share))
