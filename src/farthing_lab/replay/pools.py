"""Replay of single requests: one pool of replicas against separate prefill and decode pools.

Every pool runs the controller's rule on its own signals: request rate, backlog, the share of requests that
missed its target, and a capacity computed from the prompt lengths, cached shares and output lengths of the
last five minutes. A request is in time if it meets both targets, TTFT and TPOT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from farthing_lab.replay.policies import FarthingRule, FixedRule
from farthing_lab.replay.rate import Ints, Rule, View
from farthing_lab.replay.requests import binned
from farthing_lab.replay.run import Progress, Replay, ReplayConfig
from farthing_lab.replay.servers import Decode, Prefill, ReplayedRequest, Server, Times, Whole
from farthing_lab.replay.trace import RequestTrace

# The load of a pool: requests, what they cost a replica of each kind, and capacities computed from that.

RECENT_S = 300.0  # of the requests from which the capacity is computed
LAYOUTS = {"one pool": ("whole",), "two pools": ("prefill", "decode")}


@dataclass(frozen=True)
class PoolsConfig:
    """Targets and service of a comparison of pools."""

    ttft_s: float = 10.0
    tpot_s: float = 0.1
    slo: float = 0.99  # share of the requests that meet both, for the tuned utilizations and the oracle
    copies: int = 1  # of the trace, each shifted by up to 30 s and with prompts of its own
    times: Times = field(default_factory=Times)
    chunk_s: float | None = None  # time of an iteration with a chunk and a full batch; default: tpot_s

    @property
    def chunk(self) -> int:
        """Prompt tokens per iteration of a replica that also generates."""
        return self.times.chunk(self.chunk_s if self.chunk_s is not None else self.tpot_s)

    def __post_init__(self) -> None:
        least = self.times.step_s(self.times.max_batch)
        if not self.ttft_s > 0:
            raise ValueError(f"ttft: got {self.ttft_s}; expected a number above 0")
        if not self.tpot_s > least:
            raise ValueError(
                f"tpot: got {self.tpot_s}; expected more than {least:g} s, an iteration of a full batch"
            )
        if not 0 < self.slo < 1:
            raise ValueError(f"slo: got {self.slo}; expected a number in (0, 1)")
        if self.copies < 1:
            raise ValueError(f"copies: got {self.copies}; expected 1 or more")


def cost_s(kind: str, config: PoolsConfig, job: ReplayedRequest) -> float:
    """Replica-seconds that a request costs at full load."""
    times, prompt = config.times, job.uncached
    generate = job.output * times.step_s(times.max_batch) / times.max_batch
    if kind == "decode":
        return generate
    if kind == "prefill":
        return times.base_s + prompt * times.prefill_s
    mixed = prompt / config.chunk  # iterations with a chunk, each of which also generates
    alone = max(0.0, job.output - mixed * times.max_batch)
    each = times.step_s(times.max_batch) + config.chunk * times.prefill_s
    return mixed * each + alone * times.step_s(times.max_batch) / times.max_batch


class Recent:
    """Mean cost of recent requests in each pool, as a controller learns it."""

    def __init__(self, config: PoolsConfig, first: Iterable[ReplayedRequest]) -> None:
        self._config = config
        self._jobs = deque(first)  # until others arrive: the requests the fleet was sized for

    def add(self, now: float, job: ReplayedRequest) -> None:
        self._jobs.append(job)
        while self._jobs[0].arrival < now - RECENT_S:
            self._jobs.popleft()

    def capacity(self, kind: str) -> float:
        """Requests per second of one replica."""
        return len(self._jobs) / sum(cost_s(kind, self._config, job) for job in self._jobs)


def expected_hours(
    jobs: Sequence[ReplayedRequest], kinds: tuple[str, ...], config: PoolsConfig, u: float
) -> float:
    """Replica-hours that the requests need in these pools at utilization `u`: whole replicas, at least one
    per pool, in windows of `RECENT_S`. Without caches, queues and cold starts.
    """
    at = np.array([job.arrival for job in jobs])
    windows = (at // RECENT_S).astype(np.int64)
    total = 0.0
    for kind in kinds:
        work = np.bincount(windows, weights=[cost_s(kind, config, job) for job in jobs])
        total += float(np.maximum(1.0, np.ceil(work / (RECENT_S * u))).sum())
    return total * RECENT_S / 3600


def advised(jobs: Sequence[ReplayedRequest], config: PoolsConfig, u: float) -> str:
    """The layout that needs fewer replica-hours; one pool if both need the same."""
    return min(LAYOUTS, key=lambda layout: expected_hours(jobs, LAYOUTS[layout], config, u))


def arrivals(trace: RequestTrace, copies: int, seed: int = 0) -> list[ReplayedRequest]:
    """The requests of `copies` users of the same service, by arrival."""
    random, jobs = np.random.default_rng(seed), []
    for copy in range(copies):
        shift = random.uniform(0, 30) if copy else 0.0
        for index, at in enumerate(trace.arrival_s):
            blocks = tuple((copy << 40) + block for block in trace.blocks[index]) if trace.blocks else ()
            prompt, output = int(trace.prompt_tokens[index]), int(trace.output_tokens[index])
            jobs.append(ReplayedRequest(float(at) + shift, prompt, output, blocks, uncached=prompt))
    return sorted(jobs, key=lambda job: job.arrival)


GRID = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
TRIMMED = 8  # ticks of the oracle's schedule that change together
CHUNKS = (1.0, 1.5, 2.0, 4.0)  # iterations of one pool relative to the TPOT target, which is a mean

Utilizations = dict[str, float]  # by kind of pool
Rules = Callable[[str, Recent], Rule]  # by kind of pool; Recent: the requests that the fleet is sized for
Plans = dict[str, Ints]  # by kind of pool: [T, 1] replicas requested at every tick


@dataclass(frozen=True)
class Run:
    """Outcome of a simulation, and the schedules it followed."""

    row: dict[str, float]
    plans: Plans
    start: dict[str, Ints]  # [1] replicas ready at the beginning


class Pool:
    """Replicas of one kind, their bill, and the rule that scales them."""

    def __init__(self, kind: str, config: PoolsConfig, rule: Rule, load_time_s: float) -> None:
        self.kind, self._config, self.rule, self._load_time_s = kind, config, rule, load_time_s
        self.servers = [self._make(0.0, 0.0) for _ in range(int(rule.start[0]))]
        self.unrouted: deque[ReplayedRequest] = deque()
        self.plan: list[int] = []  # replicas requested at every tick
        self.billed_s = 0.0
        self.late = self.ended = 0  # since the last decision

    def _make(self, now: float, ready_at: float) -> Server:
        times = self._config.times
        if self.kind == "whole":
            return Whole(times, now, ready_at, ready_at, chunk=self._config.chunk)
        kind = Prefill if self.kind == "prefill" else Decode
        return kind(times, now, ready_at, ready_at)

    def missed(self, job: ReplayedRequest) -> bool:
        """Whether a finished request missed the target of this pool."""
        late, slow = job.ttft_s > self._config.ttft_s, job.tpot_s > self._config.tpot_s
        return slow if self.kind == "decode" else late if self.kind == "prefill" else late or slow

    # ---- requests ----

    def route(self, now: float, job: ReplayedRequest) -> None:
        """To the ready replica with the lowest cost; without one it waits."""
        ready = [s for s in self.servers if s.ready_at <= now and not s.draining]
        if ready:
            min(ready, key=lambda server: server.cost(job)).add(job)
        else:
            self.unrouted.append(job)

    def advance(self, now: float) -> list[ReplayedRequest]:
        """Simulate to `now`; returns the requests that this pool finished."""
        done: list[ReplayedRequest] = []
        for server in self.servers:
            if server.ready_at <= now:
                server.advance(now, done)
        for server in [s for s in self.servers if s.draining and not s.requests]:
            self.billed_s += now - server.launched
            self.servers.remove(server)
        for _ in range(len(self.unrouted)):
            self.route(now, self.unrouted.popleft())
        self.ended += len(done)
        self.late += sum(map(self.missed, done))
        return done

    @property
    def backlog(self) -> int:
        """Requests that wait."""
        return len(self.unrouted) + sum(len(server.waiting) for server in self.servers)

    # ---- scaling ----

    def decide(self, tick: int, now: float, capacity: float) -> None:
        """One decision of the rule with the current capacity, applied."""
        if isinstance(self.rule, FarthingRule):
            self.rule.capacity = capacity
        current = sum(not server.draining for server in self.servers)
        ready = sum(s.ready_at <= now and not s.draining for s in self.servers)
        wait = self.backlog / max(ready * capacity, 1e-9)
        late = self.late / self.ended if self.ended else 0.0
        self.late = self.ended = 0
        seen = (np.array([current]), np.array([ready]))
        view = View(
            tick, now, *seen, np.array([float(self.backlog)]), np.array([wait]), late=np.array([late])
        )
        target = int(self.rule.decide(view)[0])
        self.plan.append(target)
        self._scale(now, target, current)

    def _scale(self, now: float, target: int, current: int) -> None:
        for _ in range(current, target):
            self.servers.append(self._make(now, now + self._load_time_s))
        spare = sorted((s for s in self.servers if not s.draining), key=lambda s: (-s.ready_at, s.requests))
        for server in spare[: max(0, current - target)]:
            server.draining = True
            if server.ready_at > now:
                self.billed_s += now - server.launched
                self.servers.remove(server)

    def bill(self, end: float) -> float:
        """Replica-hours until `end`."""
        return (self.billed_s + sum(end - server.launched for server in self.servers)) / 3600


def follow(config: PoolsConfig, made: Replay, utilization: Utilizations) -> Rules:
    """The controller's rule: fixed utilizations, or rule `slo` from the default one if there are none."""

    def rule(kind: str, recent: Recent) -> FarthingRule:
        used = np.array([utilization.get(kind, made.config.utilization)])
        base = made.rule("stabilized" if utilization else "farthing", used, made.span(None))
        assert isinstance(base, FarthingRule)
        # the latency rule reacts to a queue that endangers the target, not to every wait for a prompt
        return replace(base, capacity=recent.capacity(kind), latency_threshold_s=config.ttft_s / 2)

    return rule


def simulate(
    jobs: list[ReplayedRequest], kinds: tuple[str, ...], config: PoolsConfig, made: Replay, rules: Rules
) -> Run:
    """Run the pools `kinds` through the requests."""
    jobs = [replace(job) for job in jobs]
    recent = Recent(config, [job for job in jobs if job.arrival < RECENT_S])
    pools = [Pool(kind, config, rules(kind, recent), made.config.load_time_s) for kind in kinds]
    done: list[ReplayedRequest] = []

    def advance(now: float) -> None:
        for pool, following in zip(pools, [*pools[1:], None], strict=True):
            ended = pool.advance(now)
            for job in sorted(ended, key=lambda job: job.end):
                if following is not None and job.output > 1:
                    following.route(now, job)
                else:
                    done.append(job)

    tick_s, index = made.setting.tick_s, 0
    for tick in range(made.ticks):
        now = tick * tick_s
        advance(now)
        for pool in pools:
            pool.decide(tick, now, recent.capacity(pool.kind))
        while index < len(jobs) and jobs[index].arrival < now + tick_s:
            job, index = jobs[index], index + 1
            advance(job.arrival)
            pools[0].route(job.arrival, job)
            recent.add(job.arrival, job)
    end = made.ticks * tick_s
    hours = {pool.kind: pool.bill(end) for pool in pools}
    while len(done) < len(jobs) and end < 10 * made.ticks * tick_s:  # the rest is not billed
        end += 15.0
        advance(end)
    first = np.array([job.ttft_s for job in jobs])
    slow = np.array([not job.tpot_s <= config.tpot_s for job in jobs])
    late = ~(first <= config.ttft_s)
    row = {
        **hours,
        "instance_hours": sum(hours.values()),
        "ttft": float(1 - late.mean()),
        "tpot": float(1 - slow.mean()),
        "slo": float(1 - (late | slow).mean()),
        "cached": 1 - sum(job.uncached for job in jobs) / sum(job.prompt for job in jobs),
    }
    plans = {pool.kind: np.array(pool.plan)[:, None] for pool in pools}
    return Run(row, plans, {pool.kind: pool.rule.start for pool in pools})


def compare(
    trace: RequestTrace,
    config: PoolsConfig,
    replaying: ReplayConfig,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Both layouts under rule `slo`, with the cheapest fixed utilizations and chunk that keep the SLO, and
    with an oracle that keeps it.

    The utilizations are chosen on the trace itself, so they compare layouts and predict nothing. The advised
    layout follows from the costs of the requests, without a simulation.
    """
    jobs = arrivals(trace, config.copies)
    times = np.array([job.arrival for job in jobs])
    single = replace(replaying, seeds=1, noise=0.0, capacity=1.0)
    made = Replay(binned(times, trace.name), single, progress)
    rows: dict[str, dict[str, Any]] = {}
    for layout, kinds in LAYOUTS.items():
        progress(layout)
        rows[layout] = dict(simulate(jobs, kinds, config, made, follow(config, made, {})).row)
        shares = CHUNKS if kinds == ("whole",) else CHUNKS[:1]
        tuned = [
            _tuned(jobs, kinds, replace(config, chunk_s=share * config.tpot_s), made, progress)
            for share in shares
        ]
        best = _cheapest([row for row, _ in tuned], config.slo)
        rows[f"{layout}, tuned"] = best
        chunked, run = next(
            (replace(config, chunk_s=share * config.tpot_s), run)
            for share, (row, run) in zip(shares, tuned, strict=True)
            if row is best
        )
        progress(f"{layout}, oracle")
        rows[f"{layout}, oracle"] = {**_trimmed(jobs, kinds, chunked, made, run), "chunk": chunked.chunk}
    return {
        "trace": trace.name,
        "requests": len(jobs),
        "ttft_s": config.ttft_s,
        "tpot_s": config.tpot_s,
        "load_time_s": replaying.load_time_s,
        "forecaster": {"model": replaying.short.model, "weights": made.weights},
        "advised": advised(jobs, config, replaying.utilization),
        "layouts": rows,
    }


def _cheapest(rows: list[dict[str, Any]], slo: float) -> dict[str, Any]:
    """The cheapest row that keeps the SLO; the one that comes closest if none does."""
    kept = [row for row in rows if row["slo"] >= slo]
    if not kept:
        return max(rows, key=lambda row: float(row["slo"]))
    return min(kept, key=lambda row: float(row["instance_hours"]))


def _tuned(
    jobs: list[ReplayedRequest], kinds: tuple[str, ...], config: PoolsConfig, made: Replay, progress: Progress
) -> tuple[dict[str, Any], Run]:
    """The run with the highest utilizations that keep the SLO, and its row; one pool after the other."""
    used = dict.fromkeys(kinds, 0.5)
    for kind in kinds:
        progress(f"tuning {kind}, chunk {config.chunk}")
        low, high = 0, len(GRID)
        while high - low > 1:
            middle = (low + high) // 2
            tried = follow(config, made, {**used, kind: GRID[middle]})
            kept = simulate(jobs, kinds, config, made, tried).row["slo"] >= config.slo
            low, high = (middle, high) if kept else (low, middle)
        used[kind] = GRID[low]
    run = simulate(jobs, kinds, config, made, follow(config, made, used))
    return {**run.row, "utilization": used, "chunk": config.chunk}, run


def _trimmed(
    jobs: list[ReplayedRequest], kinds: tuple[str, ...], config: PoolsConfig, made: Replay, run: Run
) -> dict[str, float]:
    """The run's schedule less every replica whose absence for two minutes keeps the SLO.

    It knows every request in advance, so it is an oracle; it is feasible, and cheaper than the run.
    """

    def follow_plans(plans: Plans) -> Run:
        def rule(kind: str, recent: Recent) -> Rule:
            fixed = FixedRule(plans[kind])
            fixed.start = run.start[kind]
            return fixed

        return simulate(jobs, kinds, config, made, rule)

    best = run
    for kind in kinds:
        for begin in range(0, made.ticks, TRIMMED):
            while (best.plans[kind][begin : begin + TRIMMED] > 1).any():
                plan = best.plans[kind].copy()
                plan[begin : begin + TRIMMED] = np.maximum(1, plan[begin : begin + TRIMMED] - 1)
                tried = follow_plans({**best.plans, kind: plan})
                cheaper = tried.row["instance_hours"] < best.row["instance_hours"]
                if not cheaper or tried.row["slo"] < config.slo:
                    break
                best = tried
    return best.row
