"""Computes the number of replicas from signals and forecasts.

    need = load / (utilization · capacity)   for each of three levels; the largest counts
    required = ceil(need)
    up:   immediately to `required`, if need > 1.1 · current (rule "published": need > current)
    down: to the largest `required` of one cold start (three to five minutes), if that is less than
          0.95 · current and 1.05 · need fits into fewer replicas, too; or only if required < 0.6 · current
          (rule "published"); never on missing or stale signals
    utilization: fixed, or adjusted by the SLO (`slo`)

Levels: *short* (forecast over the next cold start plus one interval), *mid* (day plan, the floor),
*realtime* (the current load, the backlog, and the latency rule "above the threshold for N seconds: factor
× the current replicas", at most one step per cold start).

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
from farthing_fleet.forecast.base import Forecast
from farthing_fleet.types import Action, Decision, Level, Levels, PolicyState, Snapshot

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


class Jumps:
    """Remembers what was planned for; the controller's state keeps it.

    A replica that is launched now serves one cold start later. While the load exceeds what the fleet planned
    one cold start ago carries at the lowest utilization, requests are late whatever the utilization, and so
    they are until the response to the jump is ready and has drained the queue. Rule `slo` does not count
    them: they would lower the utilization, at a cost, for hours in which it changes nothing.
    """

    def __init__(self, config: PolicyConfig, state: PolicyState) -> None:
        self.config, self.state = config, state

    def planned(self, now: float, load: float, lead_s: float) -> None:
        """Record the load planned for at `now`."""
        oldest = now - lead_s - 2 * self.config.interval_s - self.config.window_s(lead_s)
        self.state.planned = [(t, n) for t, n in self.state.planned if oldest <= t < now]
        self.state.planned.append((now, load))

    def excused(self, now: float, load: float, lead_s: float) -> bool:
        """Whether lateness at `now`, with this load, is due to a jump.

        At the lowest utilization the fleet has the replicas for the largest plan of the stabilization window,
        and at least the minimum. The plans of that time must be known.
        """
        config, state = self.config, self.state
        times = [t for t, _ in state.planned if t <= now - lead_s - config.interval_s]
        since = max(times, default=now)
        explained = (
            [n for t, n in state.planned if since - config.window_s(lead_s) <= t <= since] if times else []
        )
        least = config.min_replicas * config.capacity
        if explained and load > max(least, max(explained) / config.slo.lowest):
            state.excused_until = now + lead_s + config.interval_s + config.drain_s
        return state.excused_until is not None and now <= state.excused_until


@dataclass(frozen=True)
class Need:
    """The result of one level with its reason."""

    exact: float  # replicas before rounding up: tolerances compare this with the current ones
    reason: str
    load: float = 0.0  # that it plans for

    @property
    def replicas(self) -> int:
        """Whole replicas."""
        return whole(self.exact)


class Needs:
    """Evaluates the levels with a utilization that the SLO adjusts.

    The levels are described in `farthing_fleet.policy`.
    """

    def __init__(self, config: PolicyConfig, state: PolicyState) -> None:
        self.config, self.state = config, state
        self._jumps = Jumps(config, state)

    @property
    def utilization(self) -> float:
        """The current target utilization."""
        moved = self.state.utilization if self.config.by_slo else None
        return moved if moved is not None else self.config.target_utilization

    def follow_slo(self, now: float, snapshot: Snapshot) -> None:
        """Adjust the utilization by the share of late requests since the last decision.

        The time in which no utilization could have served them all is no evidence (`jumps`): it neither
        lowers nor raises the utilization.
        """
        late, load = self._late(snapshot), snapshot.load(self.config.unit)
        if load is not None and self._jumps.excused(now, load, self.lead(snapshot)):
            late = None
        since, self.state.slo_time = self.state.slo_time, now
        if not self.config.by_slo or late is None or since is None:
            return
        passed = now - since
        if 0 < passed <= max(self.config.stale_after_s, 4 * self.config.interval_s):
            self.state.utilization = self.config.slo.moved(self.utilization, late, passed)

    def excused_s(self, now: float) -> float:
        """Seconds for which lateness does not move the utilization, counted from `now`; 0 if it does."""
        until = self.state.excused_until
        return max(0.0, until - now) if self.config.by_slo and until is not None else 0.0

    def excused(self, now: float, snapshot: Snapshot) -> str:
        """In words, that present lateness does not count; empty if it does."""
        left = self.excused_s(now)
        if not left or not self._late(snapshot):
            return ""
        return f"lateness after a jump does not count for another {left:.0f} s"

    def _late(self, snapshot: Snapshot) -> float | None:
        """Share of requests that miss the SLO: 1 if the mean TPOT misses it, else by the time to first token.

        Without a histogram of that time, its mean makes the share 0 or 1.
        """
        slo = self.config.slo
        if slo.tpot_s is not None and snapshot.tpot_s is not None and snapshot.tpot_s > slo.tpot_s:
            return 1.0
        if snapshot.late_share is not None:
            return snapshot.late_share
        first = snapshot.ttft_s if snapshot.ttft_s is not None else snapshot.queue_time_s
        return float(first > slo.ttft_s) if first is not None else None

    def levels(
        self, now: float, snapshot: Snapshot, short: Forecast | None, mid: Forecast | None, rate: float
    ) -> dict[Level, Need]:
        """The replicas required by each level; `rate` is one replica's capacity."""
        until = now + self.lead(snapshot) + self.config.interval_s
        answers: dict[Level, Need] = {}
        plans: tuple[tuple[Level, Forecast | None, float], ...] = (
            ("short", short, self.config.short_quantile),
            ("mid", mid, self.config.mid_quantile),
        )
        for name, forecast, quantile in plans:
            peak = forecast.peak(now, until, quantile) if forecast is not None else None
            if name in self.config.levels and forecast is not None and peak is not None:
                need = self._needed(peak, rate)
                load = f"{peak:.4g} {self.config.unit}/s (q{quantile:.2f})"
                carried = f" (weight {forecast.weight:.0%})" if forecast.weight is not None else ""
                covered = min(until, forecast.end) - now
                short_of = f" of the {until - now:.0f} s to plan for" if covered < until - now - 1 else ""
                within = f"within {covered:.0f} s{short_of}"
                reason = f"{forecast.source}{carried} forecasts {load} {within}, needs {whole(need)}"
                answers[name] = Need(need, reason, peak)
        realtime = self._realtime(now, snapshot, rate)
        if "realtime" in self.config.levels or not answers:  # at least one level must answer
            answers["realtime"] = realtime
        self._jumps.planned(now, max(need.load for need in answers.values()), self.lead(snapshot))
        return answers

    def _realtime(self, now: float, snapshot: Snapshot, rate: float) -> Need:
        load = snapshot.load(self.config.unit)
        assert load is not None  # the policy holds if it is missing
        need = self._needed(load, rate)
        best = Need(need, f"load is {load:.4g} {self.config.unit}/s, needs {whole(need)}", load)
        work = self._backlog_work(snapshot, load)
        if work > 0:
            if self.config.drains_fast:
                drain = self.config.drain_s
                need = self._needed(load + work / drain, rate)
            else:
                drain = max(self.config.drain_s, self.lead(snapshot))
                need = (load + work / drain) / rate
            if need > best.exact:
                best = replace(best, exact=need, reason=self._with_backlog(best, snapshot, drain, need))
        step = self._latency_step(now, snapshot)
        return replace(step, load=load) if step is not None and step.exact > best.exact else best

    def _with_backlog(self, alone: Need, snapshot: Snapshot, drain: float, need: float) -> str:
        """The reason for a need with the backlog, which is named if it changes the number of replicas."""
        if whole(need) == alone.replicas:
            return alone.reason
        requests = "1 request" if snapshot.backlog == 1 else f"{snapshot.backlog:.4g} requests"
        load = f"load of {alone.load:.4g} {self.config.unit}/s (needs {alone.replicas})"
        return f"backlog of {requests} to process in {drain:.0f} s besides the {load}, needs {whole(need)}"

    def _latency_step(self, now: float, snapshot: Snapshot) -> Need | None:
        """A lasting latency breach multiplies the replicas by the factor, one step per cold start."""
        state, config = self.state, self.config
        lead = self.lead(snapshot)
        latency = self.latency(snapshot)
        if latency is None or latency <= config.latency_threshold_s:
            state.breach_since = None
        elif state.breach_since is None:
            state.breach_since = now
        stepped = state.step_time is not None and now - state.step_time < lead
        lasting = state.breach_since is not None and now - state.breach_since >= config.latency_for_s
        if lasting and not stepped:
            # starting replicas already respond to the breach; multiplying them would count them twice
            counted = snapshot.ready if config.latency_of == "ready" else None
            number = snapshot.current if counted is None else counted
            state.step_time, state.step_target = now, whole(config.latency_factor * max(1, number))
            stepped = True
        if not stepped:
            return None
        text = (
            f"{config.latency_metric} above {config.latency_threshold_s:g} s for {config.latency_for_s:g} s"
        )
        return Need(
            state.step_target, f"{text}: {config.latency_factor:g} × the replicas, {state.step_target}"
        )

    def lead(self, snapshot: Snapshot) -> float:
        """Seconds from launch to ready: measured if known and plausible, else configured."""
        return self.config.lead_s(snapshot.cold_start_s)

    def _needed(self, load: float, rate: float) -> float:
        return load / (self.utilization * rate)

    def _backlog_work(self, snapshot: Snapshot, load: float) -> float:
        """The backlog in units of the load (requests, or their tokens at the current mean)."""
        if not snapshot.backlog or snapshot.backlog < 0:
            return 0.0
        if self.config.unit == "requests":
            return snapshot.backlog
        return snapshot.backlog * load / snapshot.request_rate if snapshot.request_rate else 0.0

    def latency(self, snapshot: Snapshot) -> float | None:
        """The mean time that the latency rule observes, if measured."""
        by_name = {
            "queue_time": snapshot.queue_time_s,
            "ttft": snapshot.ttft_s,
            "tpot": snapshot.tpot_s,
            "none": None,
        }
        return by_name[self.config.latency_metric]


def whole(exact: float) -> int:
    """Replicas for a need: the ceiling, tolerating rounding of the division (2.0000000001 needs two)."""
    return math.ceil(exact - 1e-9)


class Policy:
    """Decides on the number of replicas to request. One object per deployment; not thread-safe."""

    def __init__(self, config: PolicyConfig, state: PolicyState | None = None) -> None:
        self.config = config
        self.state = state if state is not None else PolicyState()
        self._needs = Needs(config, self.state)

    @property
    def utilization(self) -> float:
        """The current target utilization: configured, or adjusted by the SLO."""
        return self._needs.utilization

    def decide(
        self,
        now: float,
        snapshot: Snapshot | None,
        short: Forecast | None = None,
        mid: Forecast | None = None,
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
            self.state.last_change = now
            return replace(woken, alarms=alarms)
        missing = self._missing(now, snapshot)
        if snapshot is None or missing:
            return self._hold(now, count, snapshot, (*alarms, *missing))
        snapshot = replace(snapshot, current=count)
        rate = capacity if capacity is not None and capacity > 0 else self.config.capacity
        self._needs.follow_slo(now, snapshot)
        answers = self._needs.levels(now, snapshot, short, mid, rate)
        decided_by, best = max(answers.items(), key=lambda item: item[1].exact)
        if snapshot.leaving > 0 and best.replicas > 0:  # replaced at the notice, before the loss
            reason = f"{best.reason}; replaces {snapshot.leaving} announced losses"
            best = Need(best.replicas + snapshot.leaving, reason)
        alarms += tuple(f"forecast: {f.note}" for f in (short, mid) if f is not None and f.note)
        alarms += self._incomplete(snapshot) + self._implausible(snapshot)
        target, held_by, why = self._bounded(now, best, snapshot)
        why = "; ".join(text for text in (why, self._needs.excused(now, snapshot)) if text)
        if target != count:
            self.state.last_change = now
        levels = Levels(**{name: answer.replicas for name, answer in answers.items()})
        return Decision(
            time=now,
            current=count,
            target=target,
            action=_action(target, count),
            decided_by=held_by or decided_by,
            levels=levels,
            required=best.replicas,
            reason=f"{decided_by}: {best.reason}" + (f"; {why}" if why else ""),
            alarms=alarms,
            inputs=_inputs(snapshot, short, mid, rate, self.utilization)
            | {"excused_s": self._needs.excused_s(now)},
        )

    # ---- bounds: down rule, stabilization, cool-down, limits ----

    def _bounded(self, now: float, need: Need, snapshot: Snapshot) -> tuple[int, str, str]:
        """Target, the bound that applied ("" if none), and the reason in words."""
        config, state, current, required = self.config, self.state, snapshot.current, need.replicas
        window = config.window_s(self._needs.lead(snapshot))
        self._remember(now, need.exact, window)
        above = 1.0 if snapshot.leaving > 0 else config.up_above  # every announced loss is replaced
        if required == current or whole(need.exact - above * current) > 0:
            target, held_by, why = required, "", ""
        elif required > current:
            target, held_by, why = current, "tolerance", f"{need.exact:.2f} is within {above:g} × {current}"
        else:
            target, held_by, why = self._down(now, need.exact, window, snapshot)
        if config.max_step is not None and abs(target - current) > config.max_step:
            target = current + int(math.copysign(config.max_step, target - current))
            held_by, why = "limits", f"at most {config.max_step} replicas per step"
        bounded = min(max(target, config.min_replicas), config.max_replicas)
        if bounded != target:
            held_by, why = "limits", f"limited to [{config.min_replicas}, {config.max_replicas}]"
        if state.settle_until is not None and now >= state.settle_until:
            state.settle_until = None
        return bounded, held_by, why

    def _down(self, now: float, need: float, window_s: float, snapshot: Snapshot) -> tuple[int, str, str]:
        config, state, current = self.config, self.state, snapshot.current
        if self._incomplete(snapshot):
            return current, "missing", "no scale-down while a signal is missing"
        if state.settle_until is not None and now < state.settle_until:
            return current, "settling", "no scale-down until a full window is observed"
        if state.last_change is not None and now - state.last_change < config.cooldown_s:
            return current, "cooldown", f"no scale-down within {config.cooldown_s:g} s of a change"
        largest = max([need, *(n for _, n in state.history)]) if window_s > 0 else need
        wanted = whole(largest)
        if wanted >= current:
            return (
                current,
                "stabilization",
                f"{wanted} were needed within the last {window_s:.0f} s",
            )
        if config.down_below < 1 and not wanted < config.down_below * current:
            return current, "down_rule", f"{wanted} is not below {config.down_below:g} × {current}"
        if whole(largest * (1 + config.down_spare)) >= current:
            return current, "tolerance", f"{largest:.2f} and {config.down_spare:.0%} do not fit into fewer"
        return wanted, "", ""

    def _remember(self, now: float, need: float, window_s: float) -> None:
        if window_s <= 0:
            return
        history = self.state.history
        # Later larger values make earlier ones irrelevant: keep a falling sequence.
        while history and history[-1][1] <= need:
            history.pop()
        history.append((now, need))
        while history[0][0] < now - window_s:
            history.pop(0)

    # ---- missing signals and clocks ----

    def _watch_clock(self, now: float, snapshot: Snapshot | None) -> tuple[str, ...]:
        """Start a new window after a start, long gap or clock jump; no scale-down within it."""
        state, config = self.state, self.config
        lead = self._needs.lead(snapshot) if snapshot is not None else None
        window = max(config.window_s(lead), config.cooldown_s)
        gap = max(config.stale_after_s, 4 * config.interval_s)
        last, state.last_time = state.last_time, now
        if last is None:
            state.settle_until = now + window
            return ()
        if 0 <= now - last <= gap:
            return ()
        state.settle_until = now + max(window, config.stale_after_s)
        state.breach_since = None
        state.history.clear()
        state.planned.clear()
        state.excused_until = None
        state.last_change = now if state.last_change is not None else None
        state.step_time = now if state.step_time is not None and now < state.step_time else state.step_time
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
        if "realtime" in self.config.levels and self.config.latency_metric != "none":
            if self._needs.latency(snapshot) is None:
                gaps.append(self.config.latency_metric)
            if snapshot.backlog is None:
                gaps.append("backlog")
        return (f"signals: missing {', '.join(gaps)}",) if gaps else ()

    def _implausible(self, snapshot: Snapshot) -> tuple[str, ...]:
        """A measured cold start that is too long to be believed."""
        measured, longest = snapshot.cold_start_s, self.config.longest_lead_s
        if measured is None or not measured > longest:
            return ()
        return (f"cold start: measured {measured:.0f} s, counted as {self._needs.lead(snapshot):.0f} s",)

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


def _inputs(
    snapshot: Snapshot, short: Forecast | None, mid: Forecast | None, capacity: float, utilization: float
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "capacity": capacity,
        "utilization": utilization,
        "snapshot": asdict(snapshot),
    }
    for name, forecast in (("short", short), ("mid", mid)):
        if forecast is not None:
            inputs[name] = {
                "source": forecast.source,
                "skill": forecast.skill,
                "weight": forecast.weight,
                "p50": max(forecast.p50),
                "p90": max(forecast.p90),
                "until": forecast.end,
            }
    return inputs
