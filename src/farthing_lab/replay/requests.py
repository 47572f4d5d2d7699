"""Replay of single requests through replicas with continuous batching and a prefix cache.

A request goes to the ready replica that costs it least (`servers.Replica`); a removed replica drains first.
The controller's policy sees what its signals would say: rates, the backlog, the queue time, TTFT and TPOT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from farthing_fleet.capacity import OnlineCapacity, Targets
from farthing_fleet.config import PolicyConfig
from farthing_fleet.forecast.learned import NEEDS
from farthing_fleet.policy import Policy
from farthing_fleet.rehearsal import Rehearsal, Settings
from farthing_fleet.types import Snapshot
from farthing_lab.replay.rate import View
from farthing_lab.replay.run import CONTROLLED, Progress, Replay, ReplayConfig, base_of
from farthing_lab.replay.servers import ReplayedRequest, Replica, Times
from farthing_lab.replay.trace import RequestTrace, binned

Jobs = list[ReplayedRequest]


class Scaler(Protocol):
    """Decides on the replicas of a fleet."""

    interval_s: float

    def target(self, now: float, fleet: Fleet) -> int: ...


@dataclass
class Fleet:
    """The replicas of one run, the unrouted requests, and the bill."""

    times: Times
    load_time_s: float
    chunk: int
    replicas: list[Replica] = field(default_factory=list)
    unrouted: deque[ReplayedRequest] = field(default_factory=deque)
    done: Jobs = field(default_factory=list)
    billed_s: float = 0.0
    changes: int = 0

    def start(self, count: int) -> None:
        """Replicas that are ready at time 0."""
        self.replicas = [Replica(self.times, 0.0, 0.0, chunk=self.chunk) for _ in range(count)]

    def ready(self, now: float) -> list[Replica]:
        return [r for r in self.replicas if r.ready_at <= now and not r.draining]

    @property
    def current(self) -> int:
        return sum(not r.draining for r in self.replicas)

    @property
    def backlog(self) -> int:
        """Requests without a first token that wait."""
        return len(self.unrouted) + sum(len(r.waiting) for r in self.replicas)

    def route(self, now: float, job: ReplayedRequest) -> None:
        """Give a request to a replica, or keep it until one is ready."""
        ready = self.ready(now)
        if not ready:
            self.unrouted.append(job)
            return
        min(ready, key=lambda r: r.cost(job)).add(job)

    def settle(self, now: float) -> None:
        """Advance every replica to `now`, remove drained ones and route waiting requests."""
        for replica in self.replicas:
            if replica.ready_at <= now:
                replica.clock = max(replica.clock, replica.ready_at)
                replica.advance(now, self.done)
        for replica in [r for r in self.replicas if r.draining and not r.requests]:
            self.billed_s += now - replica.launched
            self.replicas.remove(replica)
        while self.unrouted and self.ready(now):
            self.route(now, self.unrouted.popleft())

    def scale(self, now: float, target: int) -> None:
        """Launch or drain to reach `target` replicas: removes starting ones first, then the idlest."""
        change = target - self.current
        if not change:
            return
        self.changes += 1
        due = now + self.load_time_s
        self.replicas += [Replica(self.times, now, due, due, chunk=self.chunk) for _ in range(change)]
        spare = sorted((r for r in self.replicas if not r.draining), key=lambda r: (-r.ready_at, r.requests))
        for replica in spare[: max(0, -change)]:
            replica.draining = True
            if replica.ready_at > now:
                self.billed_s += now - replica.launched
                self.replicas.remove(replica)

    def bill(self, now: float) -> float:
        """Replica-seconds until `now`."""
        return self.billed_s + sum(now - r.launched for r in self.replicas)


def simulate(jobs: Sequence[ReplayedRequest], scaler: Scaler, fleet: Fleet, span_s: float) -> float:
    """Run the requests, then let the last replicas finish them; returns the replica-seconds of the span."""
    following, step_s = 0, min(1.0, scaler.interval_s)
    due = 0.0
    for tick in range(round(span_s / step_s)):
        now = tick * step_s
        fleet.settle(now)
        if now >= due - 1e-9:
            fleet.scale(now, scaler.target(now, fleet))
            due = now + scaler.interval_s
        while following < len(jobs) and jobs[following].arrival < now + step_s:
            fleet.route(now, jobs[following])
            following += 1
    billed, end = fleet.bill(span_s), span_s
    for _ in range(100_000):  # finish the rest; its time is not billed
        if len(fleet.done) >= len(jobs):
            break
        end += 60.0
        fleet.settle(end)
    return billed


class Controlled:
    """The controller: rehearsal, capacity model and policy on the signals of a fleet."""

    def __init__(self, config: PolicyConfig, jobs: Sequence[ReplayedRequest], *, learns: bool) -> None:
        """learns: the capacity follows the signals, else it is known. The rest is as in `LiveEstimates`."""
        self.interval_s, self._config, self._jobs = config.interval_s, config, jobs
        targets = Targets(config.latency_threshold_s, config.slo.ttft_s, config.slo.tpot_s)
        self._capacity = OnlineCapacity(config.capacity, config.unit, targets)
        self._policy, self._learns = Policy(config), learns
        self._rehearsal: Rehearsal | None = None
        self._arrived = self._finished = self._generated = 0
        self._unanswered: Jobs = []

    def target(self, now: float, fleet: Fleet) -> int:
        snapshot = self._signals(now, fleet)
        load, config = snapshot.request_rate or 0.0, self._config
        if self._learns:
            self._capacity.observe(snapshot)
        rate = self._capacity.estimate
        plan = None
        if config.rule != "published":
            if self._rehearsal is None:
                self._rehearsal = Rehearsal(Settings.of(config), load / rate)
            plan = self._rehearsal.observe(load / rate)
        return self._policy.decide(now, snapshot, plan, capacity=rate).target

    def _signals(self, now: float, fleet: Fleet) -> Snapshot:
        first, last = self._arrived, self._arrived
        while last < len(self._jobs) and self._jobs[last].arrival < now:
            last += 1
        self._arrived = last
        done = fleet.done[self._finished :]
        self._finished = len(fleet.done)
        arrived, passed = self._jobs[first:last], self.interval_s if now > 0 else 1.0
        asked = [*self._unanswered, *arrived]
        served = [job for job in asked if job.first <= now]
        self._unanswered = [job for job in asked if job.first > now]
        waits = [now - job.arrival for r in fleet.replicas for job in r.waiting]
        waits += [now - job.arrival for job in fleet.unrouted]
        times = [job.ttft_s for job in done]
        ready, generated = len(fleet.ready(now)), self._generated
        prompt = sum(job.prompt for job in served)
        self._generated = sum(job.output for job in fleet.done) + sum(r.generated for r in fleet.replicas)
        return Snapshot(
            time=now,
            current=fleet.current,
            ready=ready,
            request_rate=len(arrived) / passed,
            served_rate=len(served) / passed,
            prompt_token_rate=prompt / passed,
            output_token_rate=(self._generated - generated) / passed,
            cached_share=1 - sum(job.uncached for job in served) / max(1, prompt),
            backlog=float(len(waits)),
            queue_time_s=float(np.mean(waits)) if waits else 0.0,
            ttft_s=float(np.mean(times)) if times else None,
            tpot_s=float(np.mean([job.tpot_s for job in done])) if done else None,
        )


class _Laned:
    """A rule over lanes, for one fleet."""

    def __init__(self, made: Replay, name: str, utilization: float) -> None:
        self.interval_s, self._made = made.setting.tick_s, made
        self.rule = made.rule(name, utilization)

    def target(self, now: float, fleet: Fleet) -> int:
        tick = min(self._made.ticks - 1, round(now / self.interval_s))
        ready, backlog = len(fleet.ready(now)), float(fleet.backlog)
        wait = np.array([backlog / max(ready * self._made.setting.capacity, 1e-9)])
        counts = (np.array([fleet.current]), np.array([ready]), np.array([backlog]), wait)
        return int(self.rule.decide(View(tick, now, *counts))[0])


def replay_requests(
    trace: RequestTrace, names: tuple[str, ...], config: ReplayConfig, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Replay single requests against policies: the same document as a rate replay.

    The service times are scaled so that one replica sustains `config.capacity` requests a second. A request
    is in time if its first token comes within `slo.ttft_s` of what its prompt takes on an idle replica.
    """
    mean = len(trace) / float(trace.arrival_s[-1])
    capacity = config.capacity if config.capacity is not None else mean / config.mean_replicas
    times = Times().fitted(trace, capacity)
    rows: dict[str, Any] = {}
    for name in names:
        progress(name)
        if base_of(name) != name or name in NEEDS:
            raise ValueError(f"policy {name!r}: got single requests; expected a rate trace for it")
        row = _run(trace, name, config, capacity, times)
        parameters = "" if name in CONTROLLED else f"u {config.utilization:g}"
        rows[name] = {**row, "parameters": parameters}
    return {
        "trace": trace.name,
        "hours": float(trace.arrival_s[-1]) / 3600,
        "capacity": capacity,
        "load_time_s": config.load_time_s,
        "seeds": 1,
        "policies": rows,
    }


def requests_of(trace: RequestTrace) -> Jobs:
    """The requests of a trace, by arrival."""
    rows = zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True)
    blocks = trace.blocks or ((),) * len(trace)
    return [
        ReplayedRequest(float(at), int(prompt), int(output), found, uncached=int(prompt))
        for (at, prompt, output), found in zip(rows, blocks, strict=True)
    ]


def _run(
    trace: RequestTrace, name: str, config: ReplayConfig, capacity: float, times: Times
) -> dict[str, float]:
    single = replace(config, capacity=capacity, seeds=1, noise=0.0)
    made, jobs = Replay(binned(trace), single), requests_of(trace)
    laned = _Laned(made, name, config.utilization)
    ours = name in CONTROLLED
    scaler: Scaler = Controlled(made.policy(name), jobs, learns=False) if ours else laned
    fleet = Fleet(times, config.load_time_s, times.chunk(0.1))
    fleet.start(int(laned.rule.start[0]))
    billed = simulate(jobs, scaler, fleet, made.ticks * made.setting.tick_s)
    idle, limit = times.prefill_s, config.slo.ttft_s
    in_time = sum(job.ttft_s - job.uncached * idle <= limit for job in fleet.done)
    return {
        "instance_hours": billed / 3600,
        "slo": in_time / len(jobs),
        "changes": fleet.changes,
    }
