"""Replay of single requests through replicas with continuous batching.

A replica runs iterations. It admits a waiting request when its batch has room and computes the prompt, which
pauses the batch; otherwise one iteration generates a token for every running request, in base + share · batch
seconds. A request goes to the ready replica with the fewest requests; a removed replica drains first.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from farthing_fleet.forecast.base import Floats, Series
from farthing_lab.replay.rate import View
from farthing_lab.replay.run import RULE_OF, Progress, Replay, ReplayConfig, base_of
from farthing_lab.replay.trace import RequestTrace

BIN_S = 5.0  # of the rate series for forecasts


@dataclass(frozen=True)
class Service:
    """Times of one replica; the defaults are of a large model on one node, before scaling."""

    prefill_s_per_token: float = 1 / 8000
    decode_base_s: float = 0.02
    decode_share_s: float = 0.0005  # per request in the batch
    max_batch: int = 32

    def capacity(self, trace: RequestTrace) -> float:
        """Requests per second with a full batch, for the trace's mean request."""
        step = self.decode_base_s + self.decode_share_s * self.max_batch
        prefill = self.prefill_s_per_token * float(trace.prompt_tokens.mean())
        return 1 / (prefill + float(trace.output_tokens.mean()) * step / self.max_batch)

    def work(self, trace: RequestTrace) -> Floats:
        """[R] cost of each request on a full replica, relative to the mean request."""
        step = (self.decode_base_s + self.decode_share_s * self.max_batch) / self.max_batch
        cost = self.prefill_s_per_token * trace.prompt_tokens + step * trace.output_tokens
        return np.asarray(cost / cost.mean(), dtype=np.float64)

    def fitted(self, trace: RequestTrace, capacity: float) -> Service:
        """A replica with this capacity: the smallest sufficient batch, with all times scaled to match."""
        for batch in range(1, self.max_batch + 1):
            service = replace(self, max_batch=batch)
            if service.capacity(trace) >= capacity or batch == self.max_batch:
                break
        factor = service.capacity(trace) / capacity
        return replace(
            service,
            prefill_s_per_token=service.prefill_s_per_token * factor,
            decode_base_s=service.decode_base_s * factor,
            decode_share_s=service.decode_share_s * factor,
        )


@dataclass
class _Replica:
    """One replica. `tokens` counts iterations; `finish` is a heap of the counts at which requests finish."""

    service: Service
    launched: float
    ready_at: float
    clock: float = 0.0
    tokens: int = 0
    waiting: deque[tuple[float, int, int]] = field(default_factory=deque)  # arrival, prompt, output
    finish: list[int] = field(default_factory=list)
    draining: bool = False

    @property
    def requests(self) -> int:
        return len(self.waiting) + len(self.finish)

    def advance(self, until: float, waits: list[float]) -> None:
        """Simulate until the time `until`, finishing an iteration in flight. Appends waits of admitted
        requests.
        """
        service = self.service
        while self.clock < until:
            if self.waiting and len(self.finish) < service.max_batch:
                arrival, prompt, output = self.waiting.popleft()
                self.clock = max(self.clock, arrival)
                waits.append(self.clock - arrival)
                self.clock += prompt * service.prefill_s_per_token
                if output > 1:
                    heapq.heappush(self.finish, self.tokens + output - 1)
            elif self.finish:
                step = service.decode_base_s + service.decode_share_s * len(self.finish)
                count = min(self.finish[0] - self.tokens, max(1, math.ceil((until - self.clock) / step)))
                self.clock += count * step
                self.tokens += count
                while self.finish and self.finish[0] <= self.tokens:
                    heapq.heappop(self.finish)
            else:
                self.clock = until


class _Fleet:
    """All replicas of one run, the unrouted requests, and the bill."""

    def __init__(self, service: Service, start: int, load_time_s: float) -> None:
        self.service, self.load_time_s = service, load_time_s
        self.replicas = [_Replica(service, 0.0, 0.0) for _ in range(start)]
        self.unrouted: deque[tuple[float, int, int]] = deque()
        self.waits: list[float] = []
        self.billed_s = 0.0

    def ready(self, now: float) -> list[_Replica]:
        return [r for r in self.replicas if r.ready_at <= now and not r.draining]

    @property
    def current(self) -> int:
        return sum(not r.draining for r in self.replicas)

    def route(self, now: float, request: tuple[float, int, int]) -> None:
        ready = self.ready(now)
        if not ready:
            self.unrouted.append(request)
            return
        chosen = min(ready, key=lambda r: r.requests)
        chosen.advance(now, self.waits)
        chosen.waiting.append(request)

    def settle(self, now: float) -> None:
        """Advance every replica to `now`, remove drained ones and route waiting requests."""
        for replica in self.replicas:
            if replica.ready_at <= now:
                replica.clock = max(replica.clock, replica.ready_at)
                replica.advance(now, self.waits)
        for replica in [r for r in self.replicas if r.draining and not r.requests]:
            self.billed_s += max(now, replica.launched) - replica.launched
            self.replicas.remove(replica)
        while self.unrouted and self.ready(now):
            self.route(now, self.unrouted.popleft())

    def scale(self, now: float, target: int) -> None:
        """Launch or drain to reach `target` replicas: removes starting ones first, then the idlest."""
        for _ in range(self.current, target):
            self.replicas.append(
                _Replica(self.service, now, now + self.load_time_s, clock=now + self.load_time_s)
            )
        spare = sorted((r for r in self.replicas if not r.draining), key=lambda r: (-r.ready_at, r.requests))
        for replica in spare[: max(0, self.current - target)]:
            replica.draining = True
            if replica.ready_at > now:
                self.billed_s += now - replica.launched
                self.replicas.remove(replica)

    def backlog(self) -> int:
        return len(self.unrouted) + sum(len(r.waiting) for r in self.replicas)


def replay_requests(
    trace: RequestTrace, names: tuple[str, ...], config: ReplayConfig, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Replay single requests against policies: the same document as a rate replay.

    The service times are scaled so that one replica sustains `config.capacity` requests a second;
    each seed moves every arrival by up to 5 s either way (without noise: not at all).
    """
    mean = len(trace) / float(trace.arrival_s[-1])
    capacity = config.capacity if config.capacity is not None else mean / config.mean_replicas
    service = Service().fitted(trace, capacity)
    runs = [_jittered(trace, seed, config) for seed in range(config.seeds)]
    single = replace(config, capacity=capacity, seeds=1, noise=0.0)
    made = [Replay(_rates(run), single) for run in runs]
    rows: dict[str, Any] = {}
    for name in names:
        progress(name)
        base = base_of(name)
        if base == "oracle":
            utilization, outcomes = _oracle(runs, single, service)
        else:
            utilization = config.utilization if name == base else made[0].tune(base)
            outcomes = [
                _run(run, one, base, utilization, service) for run, one in zip(runs, made, strict=True)
            ]
        keys = ("instance_hours", "slo", "changes", "direction_changes")
        row = {key: float(np.mean([outcome[key] for outcome in outcomes])) for key in keys}
        rows[name] = {
            **row,
            "cost": row["instance_hours"] * config.price_per_hour,
            "utilization": utilization,
            "rule": RULE_OF.get(base, base),
        }
    return {
        "trace": trace.name,
        "hours": float(trace.arrival_s[-1]) / 3600,
        "capacity": capacity,
        "load_time_s": config.load_time_s,
        "seeds": config.seeds,
        "forecaster": {"model": config.short.model, "weights": made[0].weights},
        "policies": rows,
    }


def _jittered(trace: RequestTrace, seed: int, config: ReplayConfig) -> RequestTrace:
    if config.noise == 0:
        return trace
    shift = np.random.default_rng(seed).uniform(-5, 5, len(trace))
    arrival = np.clip(trace.arrival_s + shift, 0, None)
    order = np.argsort(arrival, kind="stable")
    return RequestTrace(trace.name, arrival[order], trace.prompt_tokens[order], trace.output_tokens[order])


def _oracle(
    runs: list[RequestTrace], config: ReplayConfig, service: Service
) -> tuple[float, list[dict[str, float]]]:
    """The oracle's utilization and outcomes: it knows the work of every request, not only their number.

    Work arrives unevenly within its minute, so the utilization is lowered until the SLO is kept.
    """
    told = replace(config, short=replace(config.short, model="last-value"))
    made = [Replay(_rates(run, service.work(run)), told) for run in runs]
    utilization = config.utilization
    while True:
        outcomes = [
            _run(run, one, "oracle", utilization, service) for run, one in zip(runs, made, strict=True)
        ]
        kept = float(np.mean([outcome["slo"] for outcome in outcomes]))
        if kept >= config.slo_target or utilization < 0.1:
            return utilization, outcomes
        utilization *= 0.93


def _rates(trace: RequestTrace, weight: Floats | None = None) -> Series:
    """Requests per second in bins of five seconds, each counted by its `weight` [R] (default 1)."""
    return binned(trace.arrival_s, trace.name, weight)


def binned(arrival_s: Floats, name: str, weight: Floats | None = None) -> Series:
    """The rate of requests that arrive at these times."""
    count = max(4, math.ceil(float(arrival_s[-1]) / BIN_S) + 1)
    counts = np.bincount((arrival_s / BIN_S).astype(int), weights=weight, minlength=count)
    return Series(0.0, BIN_S, counts / BIN_S, name)


def _run(
    trace: RequestTrace, made: Replay, name: str, utilization: float, service: Service
) -> dict[str, float]:
    """Run one policy on one trace; the last replicas finish the remaining requests."""
    rule = made.rule(name, np.array([utilization]), made.span(None))
    load_time = 0.0 if name == "oracle" else made.config.load_time_s
    fleet = _Fleet(service, int(rule.start[0]), load_time)
    tick_s, following = made.setting.tick_s, 0
    changes = turns = direction = 0
    for tick in range(made.ticks):
        now = tick * tick_s
        fleet.settle(now)
        current, backlog = fleet.current, fleet.backlog()
        ready = len(fleet.ready(now))
        wait = backlog / max(ready * made.setting.capacity, 1e-9)
        view = View(
            tick,
            now,
            current=np.array([current]),
            ready=np.array([ready]),
            backlog=np.array([float(backlog)]),
            wait=np.array([wait]),
            late=np.array([float(wait > made.config.wait_slo_s)]),
        )
        delta = int(rule.decide(view)[0]) - current
        if delta:
            sign = 1 if delta > 0 else -1
            changes, turns, direction = changes + 1, turns + (direction == -sign), sign
            fleet.scale(now, current + delta)
        while following < len(trace) and trace.arrival_s[following] < now + tick_s:
            at = float(trace.arrival_s[following])
            fleet.route(at, (at, int(trace.prompt_tokens[following]), int(trace.output_tokens[following])))
            following += 1
    end = made.ticks * tick_s
    billed = fleet.billed_s + sum(end - r.launched for r in fleet.replicas)
    for _ in range(10_000):  # finish the rest; its time is not billed
        if not fleet.backlog():
            break
        end += 60.0
        fleet.settle(end)
    served = np.array(fleet.waits)
    hours = float(made.oracle(utilization)[0]) if name == "oracle" else billed / 3600
    slo = float((served <= made.config.wait_slo_s).sum()) / max(1, len(served) + fleet.backlog())
    return {"instance_hours": hours, "slo": slo, "changes": changes, "direction_changes": turns}
