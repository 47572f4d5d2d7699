"""From signals and forecasts to a number of replicas.

    required = ceil(load / (utilization · capacity))   for each of three levels; the largest counts
    up:   at once to `required`
    down: to the largest `required` of five minutes (rules "slo" and "stabilized"), or only when
          required < 0.6 · current (rule "published"); never on missing or stale signals
    utilization: fixed, or moved by the SLO (`slo`)

Levels: *short* (forecast over one cold start + one interval ahead), *mid* (day plan, the floor), *realtime*
(the load now, the backlog, and the latency rule "above the threshold for N seconds: factor × the current
replicas", one step a cold start).

`Policy.decide` is a pure function of its arguments and `Policy.state`; it reads no clock and does no I/O, so
that the same object runs in the controller and in a replay. Times may be of any one clock; a jump of it is
noticed and never scales down.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from farthing.fleet.decisions import Action, Decision, Level, Levels
from farthing.fleet.forecast.curve import Forecast
from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.snapshot import Snapshot
from farthing.fleet.wake import wake


@dataclass
class PolicyState:
    """What the policy remembers between decisions; saved as JSON for a restarted controller."""

    last_time: float | None = None
    last_change: float | None = None
    settle_until: float | None = None  # no scale-down before this: after a start or a jump of the clock
    breach_since: float | None = None  # latency above the threshold without a break since
    step_time: float | None = None  # last step of the latency rule, and its target
    step_target: int = 0
    utilization: float | None = None  # as moved by the SLO
    slo_time: float | None = None  # when it was moved last
    history: list[tuple[float, int]] = field(
        default_factory=list
    )  # (time, required) of the stabilization window

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PolicyState:
        try:
            data: dict[str, Any] = json.loads(text)
            data["history"] = [(float(t), int(n)) for t, n in data.get("history", [])]
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a saved policy state ({error}): {text[:80]!r}") from error


@dataclass(frozen=True)
class _Level:
    """One level's answer with its reason."""

    replicas: int
    reason: str


class Policy:
    """Decides how many replicas to ask for. One object a deployment; not thread-safe."""

    def __init__(self, config: PolicyConfig, state: PolicyState | None = None) -> None:
        self.config = config
        self.state = state if state is not None else PolicyState()

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

        `snapshot` None means that no signals could be had; `current` must then say how many replicas are
        asked for. `capacity` overrides the configured one (learned online). Raises ValueError where the
        number of current replicas is unknown.
        """
        if snapshot is None and current is None:
            raise ValueError(
                "Policy.decide: without a snapshot, `current` must say how many replicas are asked for"
            )
        count = current if current is not None else (snapshot.current if snapshot is not None else 0)
        alarms = self._watch_clock(now)
        woken = wake(now, count, snapshot, self.config)
        if woken is not None:
            self.state.last_change = now
            return replace(woken, alarms=alarms)
        missing = self._missing(now, snapshot)
        if snapshot is None or missing:
            return self._hold(now, count, snapshot, (*alarms, *missing))
        snapshot = replace(snapshot, current=count)
        rate = capacity if capacity is not None and capacity > 0 else self.config.capacity
        self._follow_slo(now, snapshot)
        answers = self._levels(now, snapshot, short, mid, rate)
        decided_by, best = max(answers.items(), key=lambda item: item[1].replicas)
        if snapshot.leaving > 0 and best.replicas > 0:  # replaced at the notice, not at the loss
            reason = f"{best.reason}; {snapshot.leaving} that will be taken away replaced"
            best = _Level(best.replicas + snapshot.leaving, reason)
        alarms += tuple(f"forecast: {f.note}" for f in (short, mid) if f is not None and f.note)
        alarms += self._incomplete(snapshot)
        target, held_by, why = self._bounded(now, best.replicas, count, bool(self._incomplete(snapshot)))
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
            inputs=_inputs(snapshot, short, mid, rate, self.utilization),
        )

    # ---- the SLO ----

    @property
    def utilization(self) -> float:
        """The target utilization in force."""
        moved = self.state.utilization if self.config.by_slo else None
        return moved if moved is not None else self.config.target_utilization

    def _follow_slo(self, now: float, snapshot: Snapshot) -> None:
        """Move the utilization by the share of late requests since the last decision."""
        late = self._late(snapshot)
        since, self.state.slo_time = self.state.slo_time, now
        if not self.config.by_slo or late is None or since is None:
            return
        passed = now - since
        if 0 < passed <= max(self.config.stale_after_s, 4 * self.config.interval_s):
            self.state.utilization = self.config.slo.moved(self.utilization, late, passed)

    def _late(self, snapshot: Snapshot) -> float | None:
        """The share of requests that miss the SLO: measured, else all or none by the mean times."""
        slo = self.config.slo
        if snapshot.late_share is not None:
            return snapshot.late_share
        first = snapshot.ttft_s if snapshot.ttft_s is not None else snapshot.queue_time_s
        if first is None:
            return None
        slow = slo.tpot_s is not None and snapshot.tpot_s is not None and snapshot.tpot_s > slo.tpot_s
        return 1.0 if first > slo.ttft_s or slow else 0.0

    # ---- the three levels ----

    def _levels(
        self, now: float, snapshot: Snapshot, short: Forecast | None, mid: Forecast | None, rate: float
    ) -> dict[Level, _Level]:
        until = now + self.lead(snapshot) + self.config.interval_s
        answers: dict[Level, _Level] = {}
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
                reason = (
                    f"{forecast.source}{carried} forecasts {load} within {until - now:.0f} s, needs {need}"
                )
                answers[name] = _Level(need, reason)
        realtime = self._realtime(now, snapshot, rate)
        if "realtime" in self.config.levels or not answers:  # something must always answer
            answers["realtime"] = realtime
        return answers

    def _realtime(self, now: float, snapshot: Snapshot, rate: float) -> _Level:
        load = snapshot.load(self.config.unit)
        assert load is not None  # _missing has seen to it
        need = self._needed(load, rate)
        best = _Level(need, f"load is {load:.4g} {self.config.unit}/s, needs {need}")
        work = self._backlog_work(snapshot, load)
        if work > 0:
            if self.config.drains_fast:
                drain = self.config.drain_s
                need = self._needed(load + work / drain, rate)
            else:
                drain = max(self.config.drain_s, self.lead(snapshot))
                need = _ceil((load + work / drain) / rate)
            if need > best.replicas:
                best = _Level(
                    need,
                    f"backlog of {snapshot.backlog:.4g} requests worked off in {drain:.0f} s needs {need}",
                )
        step = self._latency_step(now, snapshot)
        return step if step is not None and step.replicas > best.replicas else best

    def _latency_step(self, now: float, snapshot: Snapshot) -> _Level | None:
        """A latency breach that lasts raises the target by the factor, once a cold start, held that long."""
        state, config = self.state, self.config
        lead = self.lead(snapshot)
        latency = self._latency(snapshot)
        if latency is None or latency <= config.latency_threshold_s:
            state.breach_since = None
        elif state.breach_since is None:
            state.breach_since = now
        stepped = state.step_time is not None and now - state.step_time < lead
        lasting = state.breach_since is not None and now - state.breach_since >= config.latency_for_s
        if lasting and not stepped:
            # those that start already answer the breach: to multiply them too would count them twice
            counted = snapshot.ready if config.latency_of == "ready" else None
            number = snapshot.current if counted is None else counted
            state.step_time, state.step_target = now, _ceil(config.latency_factor * max(1, number))
            stepped = True
        if not stepped:
            return None
        text = (
            f"{config.latency_metric} above {config.latency_threshold_s:g} s for {config.latency_for_s:g} s"
        )
        return _Level(
            state.step_target, f"{text}: {config.latency_factor:g} × the replicas then, {state.step_target}"
        )

    def lead(self, snapshot: Snapshot) -> float:
        """Launch to ready in seconds: measured where it is known, else configured."""
        measured = snapshot.cold_start_s
        return (
            measured
            if measured is not None and measured >= 0 and math.isfinite(measured)
            else self.config.cold_start_s
        )

    def _needed(self, load: float, rate: float) -> int:
        return _ceil(load / (self.utilization * rate))

    def _backlog_work(self, snapshot: Snapshot, load: float) -> float:
        """The backlog in units of the load (requests, or their tokens at the present mean)."""
        if not snapshot.backlog or snapshot.backlog < 0:
            return 0.0
        if self.config.unit == "requests":
            return snapshot.backlog
        return snapshot.backlog * load / snapshot.request_rate if snapshot.request_rate else 0.0

    def _latency(self, snapshot: Snapshot) -> float | None:
        by_name = {
            "queue_time": snapshot.queue_time_s,
            "ttft": snapshot.ttft_s,
            "tpot": snapshot.tpot_s,
            "none": None,
        }
        return by_name[self.config.latency_metric]

    # ---- bounds: down rule, stabilization, cool-down, limits ----

    def _bounded(self, now: float, required: int, current: int, incomplete: bool) -> tuple[int, str, str]:
        """Target, what bounded it ("" if nothing did), and why in words."""
        config, state = self.config, self.state
        self._remember(now, required)
        if required >= current:
            target, held_by, why = required, "", ""
        else:
            target, held_by, why = self._down(now, required, current, incomplete)
        if config.max_step is not None and abs(target - current) > config.max_step:
            target = current + int(math.copysign(config.max_step, target - current))
            held_by, why = "limits", f"at most {config.max_step} replicas a step"
        bounded = min(max(target, config.min_replicas), config.max_replicas)
        if bounded != target:
            held_by, why = "limits", f"bounded to [{config.min_replicas}, {config.max_replicas}]"
        if state.settle_until is not None and now >= state.settle_until:
            state.settle_until = None
        return bounded, held_by, why

    def _down(self, now: float, required: int, current: int, incomplete: bool) -> tuple[int, str, str]:
        config, state = self.config, self.state
        if incomplete:
            return current, "missing", "no scale-down while a signal is missing"
        if state.settle_until is not None and now < state.settle_until:
            return current, "settling", "no scale-down until a whole window has been seen"
        if state.last_change is not None and now - state.last_change < config.cooldown_s:
            return current, "cooldown", f"no scale-down within {config.cooldown_s:g} s of a change"
        wanted = max([required, *(n for _, n in state.history)]) if config.window_s > 0 else required
        if wanted >= current:
            return (
                current,
                "stabilization",
                f"{wanted} were needed within the last {config.window_s:g} s",
            )
        if config.down_below < 1 and not wanted < config.down_below * current:
            return current, "down_rule", f"{wanted} is not below {config.down_below:g} × {current}"
        return wanted, "", ""

    def _remember(self, now: float, required: int) -> None:
        if self.config.window_s <= 0:
            return
        history = self.state.history
        while (
            history and history[-1][1] <= required
        ):  # a later, larger one hides the earlier: keep a falling sequence
            history.pop()
        history.append((now, required))
        while history[0][0] < now - self.config.window_s:
            history.pop(0)

    # ---- missing signals and clocks ----

    def _watch_clock(self, now: float) -> tuple[str, ...]:
        """Starts, long gaps and jumps begin a new window, in which nothing is taken away."""
        state, config = self.state, self.config
        window = max(config.window_s, config.cooldown_s)
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
        state.last_change = now if state.last_change is not None else None
        state.step_time = now if state.step_time is not None and now < state.step_time else state.step_time
        return (f"clock: {now - last:+.0f} s since the last decision; windows restart",)

    def _missing(self, now: float, snapshot: Snapshot | None) -> tuple[str, ...]:
        """Why the snapshot cannot be used at all; empty where it can."""
        if snapshot is None:
            return ("signals: none",)
        age = now - snapshot.time
        if snapshot.stale:
            return ("signals: the source says they are stale",)
        if not -self.config.interval_s <= age <= self.config.stale_after_s:
            return (f"signals: {age:.0f} s old, at most {self.config.stale_after_s:g} s are trusted",)
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
            if self._latency(snapshot) is None:
                gaps.append(self.config.latency_metric)
            if snapshot.backlog is None:
                gaps.append("backlog")
        return (f"signals: missing {', '.join(gaps)}",) if gaps else ()

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
            reason="signals are missing or stale: hold, never scale down"
            + (", up to the minimum" if target != current else ""),
            alarms=alarms,
            inputs={"snapshot": asdict(snapshot)} if snapshot is not None else {},
        )


def _ceil(value: float) -> int:
    """Ceiling that forgives the rounding of the division (2.0000000001 needs two)."""
    return math.ceil(value - 1e-9)


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
