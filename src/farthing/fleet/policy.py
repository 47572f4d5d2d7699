"""Computes the number of replicas from signals and forecasts.

    need = load / (utilization · capacity)   for each of three levels; the largest counts
    required = ceil(need)
    up:   immediately to `required`, if need > 1.1 · current (rule "published": need > current)
    down: to the largest `required` of one cold start (three to five minutes), if that is less than
          0.95 · current and 1.05 · need fits into fewer replicas, too; or only if required < 0.6 · current
          (rule "published"); never on missing or stale signals
    utilization: fixed, or adjusted by the SLO (`slo`)

Levels: *short* (forecast over the next cold start plus one interval), *mid* (day plan, the floor), *realtime*
(the current load, the backlog, and the latency rule "above the threshold for N seconds: factor × the current
replicas", at most one step per cold start).

`Policy.decide` is a pure function of its arguments and `Policy.state`; it reads no clock and does no I/O, so
the controller and replays use the same object. Times may come from any single clock; a jump of the clock is
detected and never scales down.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from farthing.fleet.decisions import Action, Decision, Levels
from farthing.fleet.forecast.curve import Forecast
from farthing.fleet.needs import Need, Needs, whole
from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.policy_state import PolicyState
from farthing.fleet.snapshot import Snapshot
from farthing.fleet.wake import wake


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
