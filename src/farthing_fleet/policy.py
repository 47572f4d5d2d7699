"""Computes the number of replicas from signals and a plan.

    short      what the plan wants (`farthing_fleet.rehearsal`, or a forecaster that was chosen by name);
               without any, load / (utilization · capacity)
    realtime   the load and the backlog

The rule `published` has levels of its own. The larger one counts, at once, up or down. Down only with all
signals, not within a cold start of a start or a jump of the clock, and never while the load is steady and the
fleet within the tolerances for noise.

Every answer is a total that includes the replicas which are starting, so no need is ordered twice.

`Policy.decide` is a pure function of its arguments and `Policy.state`; it reads no clock and does no I/O, so
the controller and replays use the same object. Times may come from any single clock; a jump of the clock is
detected and never scales down.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from farthing_fleet.config import PolicyConfig
from farthing_fleet.published import Published
from farthing_fleet.rehearsal import Noise, Plan, drain
from farthing_fleet.types import Action, Decision, Level, Levels, Need, PolicyState, Snapshot, whole

# With a steady load a replica goes only if the fleet without it is larger than the need by this factor.
SPARE = 1.2
_ROUNDING = 1e-6  # a smaller backlog is none
_SETTLE = 4  # intervals without scale-down after a start, if a cold start is not longer
_FRESH_S = 5.0  # older reports are ignored: gateways report every second


@dataclass
class Held:
    """The latest number of held requests of each gateway; every report sets `reported`."""

    clock: Callable[[], float] = time.monotonic
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    _reports: dict[str, tuple[int, float]] = field(default_factory=dict)  # gateway -> (requests, time)

    def report(self, gateway: str, waiting: int) -> None:
        """Record a report. Raises ValueError for a negative number."""
        if waiting < 0:
            raise ValueError(f"waiting: got {waiting}; expected 0 or more")
        self._reports[gateway] = (waiting, self.clock())
        self.reported.set()

    def total(self) -> int:
        """Requests held now; ignores gateways that stopped reporting."""
        now = self.clock()
        self._reports = {name: r for name, r in self._reports.items() if now - r[1] <= _FRESH_S}
        return sum(waiting for waiting, _ in self._reports.values())


def wake(now: float, current: int, snapshot: Snapshot | None, config: PolicyConfig) -> Decision | None:
    """The decision that wakes a fleet of zero replicas for waiting requests; None if there are none.

    Starts at least one replica, and enough to process the backlog within `drain_s` or a cold start.

    At zero replicas the usual signals are missing, so the requests held by gateways are the load. Each
    gateway reports to `/wake` on the controller's metrics port while it holds requests.
    """
    backlog = snapshot.backlog if snapshot is not None else None
    if current != 0 or not backlog or config.max_replicas < 1:
        return None
    drain = max(config.drain_s, config.lead_s(snapshot.cold_start_s if snapshot is not None else None))
    rate = config.capacity if config.unit == "requests" else math.inf  # only requests are known
    need = max(1, math.ceil(backlog / (drain * rate)))
    target = min(max(need, config.min_replicas), config.max_replicas)
    return Decision(
        time=now,
        current=0,
        target=target,
        action="up",
        decided_by="realtime",
        levels=Levels(realtime=need),
        required=need,
        inputs={"snapshot": asdict(snapshot)} if snapshot is not None else {},
        reason=("wake: 1 request waits" if backlog == 1 else f"wake: {backlog:.4g} requests wait")
        + f" without a replica; needs {need} to process them in {drain:.0f} s",
    )


class Needs:
    """Evaluates the levels; see the module."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    def levels(self, snapshot: Snapshot, plan: Plan | None, load: float, rate: float) -> dict[Level, Need]:
        """The replicas required by each level; `rate` is one replica's capacity."""
        unit = f"{self.config.unit}/s"
        if plan is not None:
            rule = plan.rule if plan.rules == 1 else f"the mean of {plan.rules} rules, led by {plan.rule},"
            text = f"{rule} plans for {plan.load * rate:.4g} {unit} at {1 / plan.margin:.0%} utilization"
            short = Need(plan.need, f"{text}, needs {whole(plan.need)}")
        else:
            need = load / (self.config.target_utilization * rate)
            short = Need(need, f"load is {load:.4g} {unit}, needs {whole(need)}")
        answers: dict[Level, Need] = {"short": short}
        backlog = self._backlog(snapshot, load, rate)
        if backlog is not None:
            answers["realtime"] = backlog
        return answers

    def _backlog(self, snapshot: Snapshot, load: float, rate: float) -> Need | None:
        """Replicas for the load and the backlog.

        Replicas that are starting are not deducted from the backlog: they are part of the answer, a total.
        """
        work = self.backlog_work(snapshot, load)
        if work <= _ROUNDING:
            return None
        lead_s = self.config.lead_s(snapshot.cold_start_s) + self.config.interval_s
        extra = float(drain(load / rate, work / rate, self.config.drain_s, lead_s))
        need = load / rate + extra
        requests = "1 request" if snapshot.backlog == 1 else f"{snapshot.backlog:.4g} requests"
        text = f"backlog of {requests} besides {load:.4g} {self.config.unit}/s"
        return Need(need, f"{text}, needs {whole(need)} to process it in {work / rate / extra:.0f} s")

    def backlog_work(self, snapshot: Snapshot, load: float) -> float:
        """The backlog in units of the load (requests, or their tokens at the current mean)."""
        if not snapshot.backlog or not 0 < snapshot.backlog < math.inf:
            return 0.0
        if self.config.unit == "requests":
            return snapshot.backlog
        return snapshot.backlog * load / snapshot.request_rate if snapshot.request_rate else 0.0


class Policy:
    """Decides on the number of replicas to request. One object per deployment; not thread-safe."""

    def __init__(self, config: PolicyConfig, state: PolicyState | None = None) -> None:
        self.config = config
        self.state = state if state is not None else PolicyState()
        self._published = Published(config, self.state) if config.rule == "published" else None
        self._needs = Needs(config)

    def decide(
        self,
        now: float,
        snapshot: Snapshot | None,
        plan: Plan | None = None,
        *,
        current: int | None = None,
        capacity: float | None = None,
    ) -> Decision:
        """The decision for `now`.

        If `snapshot` is None (no signals), `current` must be the number of requested replicas. `capacity`
        overrides the configured one (learned online). Raises ValueError if the current number of replicas is
        unknown.
        """
        if snapshot is None and current is None:
            raise ValueError(
                "Policy.decide: current is None without a snapshot; expected the requested replicas"
            )
        count = current if current is not None else (snapshot.current if snapshot is not None else 0)
        alarms = self._watch_clock(now, snapshot)
        woken = wake(now, count, snapshot, self.config)
        if woken is not None:
            return replace(woken, alarms=alarms)
        missing = self._missing(now, snapshot)
        if snapshot is None or missing:
            return self._hold(now, count, snapshot, (*alarms, *missing))
        snapshot = replace(snapshot, current=count)
        rate = capacity if capacity is not None and capacity > 0 else self.config.capacity
        load = snapshot.load(self.config.unit)
        assert load is not None  # else it is missing
        if self._published is not None:
            answers, wait_s = self._published.levels(now, snapshot, load, rate), 0.0
        else:
            answers = self._needs.levels(snapshot, plan, load, rate)
            wait_s = self._needs.backlog_work(snapshot, load) / (rate * max(1, snapshot.ready or 0))
        decided_by, best = max(answers.items(), key=lambda item: item[1].exact)
        alarms += self._incomplete(snapshot) + self._implausible(snapshot)
        steady = plan.steady if plan is not None else None
        now_needed = decided_by == "realtime"
        target, held_by, why = self._bounded(now, best, snapshot, steady, wait_s, now_needed=now_needed)
        if target != count:
            self.state.last_change = now
        return Decision(
            time=now,
            current=count,
            target=target,
            action=_action(target, count),
            decided_by=held_by or decided_by,
            levels=Levels(**{name: answer.replicas for name, answer in answers.items()}),
            required=best.replicas,
            reason=f"{decided_by}: {best.reason}" + (f"; {why}" if why else ""),
            alarms=alarms,
            inputs=_inputs(snapshot, plan, rate, self.config.target_utilization),
        )

    # ---- bounds: noise, missing signals, cool-down, limits ----

    def _bounded(
        self,
        now: float,
        need: Need,
        snapshot: Snapshot,
        steady: Noise | None,
        wait_s: float,
        *,
        now_needed: bool,
    ) -> tuple[int, str, str]:
        """Target, the bound that applied ("" if none), and the reason in words. wait_s: of the backlog."""
        config, state, current, target = self.config, self.state, snapshot.current, need.replicas
        held_by = why = ""
        if (
            steady is not None
            and steady.high <= current
            # either may differ by noise only: a plan may know of a rise that the load does not show yet
            and max(current, target) < 1 + SPARE * steady.need
            and (target < current or not now_needed)
        ):
            if target != current:
                held_by, why = "steady", f"the load is steady and needs {steady.need:.4g} on average"
            target = current
        elif target < current:
            held_by, why = self._held(now, snapshot, wait_s)
            target = current if held_by else target
        bounded = min(max(target, config.min_replicas), config.max_replicas)
        if bounded != target:
            held_by, why = "limits", f"limited to [{config.min_replicas}, {config.max_replicas}]"
        if state.settle_until is not None and now >= state.settle_until:
            state.settle_until = None
        return bounded, held_by, why

    def _held(self, now: float, snapshot: Snapshot, wait_s: float) -> tuple[str, str]:
        """What forbids to scale down now, and why; empty if nothing does."""
        config, state = self.config, self.state
        if self._incomplete(snapshot):
            return "missing", "no scale-down while a signal is missing"
        if wait_s > config.slo.ttft_s:
            return "backlog", f"no scale-down while the backlog takes the ready replicas {wait_s:.0f} s"
        if state.settle_until is not None and now < state.settle_until:
            return "settling", "no scale-down until a cold start is observed"
        if state.last_change is not None and now - state.last_change < config.cooldown_s:
            return "cooldown", f"no scale-down within {config.cooldown_s:g} s of a change"
        return "", ""

    # ---- missing signals and clocks ----

    def _watch_clock(self, now: float, snapshot: Snapshot | None) -> tuple[str, ...]:
        """Start a new window after a start, long gap or clock jump; no scale-down within it."""
        state, config = self.state, self.config
        lead = snapshot.cold_start_s if snapshot is not None else None
        window = max(config.lead_s(lead), _SETTLE * config.interval_s, config.cooldown_s)
        gap = max(config.stale_after_s, 4 * config.interval_s)
        last, state.last_time = state.last_time, now
        if last is None:
            state.settle_until = now + window
            return ()
        if 0 <= now - last <= gap:
            return ()
        state.settle_until = now + max(window, config.stale_after_s)
        state.breach_since = None
        state.last_change = now if state.last_change is not None else None
        return (f"clock: {now - last:+.0f} s since the last decision; windows restart",)

    def _missing(self, now: float, snapshot: Snapshot | None) -> tuple[str, ...]:
        """Reasons why the snapshot is unusable; empty if it is usable."""
        if snapshot is None:
            return ("signals: none",)
        age = now - snapshot.time
        if snapshot.stale:
            return ("signals: marked stale by the source",)
        if not -self.config.interval_s <= age <= self.config.stale_after_s:
            return (f"signals: {age:.0f} s old, more than {self.config.stale_after_s:g} s",)
        load = snapshot.load(self.config.unit)
        if load is None or not math.isfinite(load) or load < 0:
            return (f"signals: no load in {self.config.unit}/s ({load})",)
        return ()

    def _incomplete(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Missing signals other than the load: they allow scale-up, not scale-down."""
        gaps = []
        if snapshot.ready is None:
            gaps.append("ready")
        if self.config.latency_metric != "none":
            if self.config.latency(snapshot) is None:
                gaps.append(self.config.latency_metric)
            if snapshot.backlog is None:
                gaps.append("backlog")
        return (f"signals: missing {', '.join(gaps)}",) if gaps else ()

    def _implausible(self, snapshot: Snapshot) -> tuple[str, ...]:
        """A measured cold start that is too long to be believed."""
        measured, longest = snapshot.cold_start_s, self.config.longest_lead_s
        if measured is None or not measured > longest:
            return ()
        return (f"cold start: measured {measured:.0f} s, counted as {self.config.lead_s(measured):.0f} s",)

    def _hold(self, now: float, current: int, snapshot: Snapshot | None, alarms: tuple[str, ...]) -> Decision:
        self.state.breach_since = None
        target = max(current, min(self.config.min_replicas, self.config.max_replicas))
        return Decision(
            time=now,
            current=current,
            target=target,
            action=_action(target, current),
            decided_by="limits" if target != current else "stale",
            levels=Levels(),
            reason="signals are missing or stale: hold, no scale-down"
            + (", up to the minimum" if target != current else ""),
            alarms=alarms,
            inputs={"snapshot": asdict(snapshot)} if snapshot is not None else {},
        )


def _action(target: int, current: int) -> Action:
    return "up" if target > current else "down" if target < current else "hold"


def _inputs(snapshot: Snapshot, plan: Plan | None, capacity: float, utilization: float) -> dict[str, Any]:
    return {
        "capacity": capacity,
        "utilization": 1 / plan.margin if plan is not None else utilization,
        "snapshot": dict(vars(snapshot)),  # `asdict` would be a third of a replay
        **({"plan": dict(vars(plan))} if plan is not None else {}),
    }
