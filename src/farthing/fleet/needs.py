"""The number of replicas required by load, forecasts and latency: the three levels of the policy.

The levels are described in `farthing.fleet.policy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from farthing.fleet.decisions import Level
from farthing.fleet.forecast.curve import Forecast
from farthing.fleet.jumps import Jumps
from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.policy_state import PolicyState
from farthing.fleet.snapshot import Snapshot


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
    """Evaluates the levels with a utilization that the SLO adjusts."""

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
