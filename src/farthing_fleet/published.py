"""The rule `published`: a utilization, and a step while the latency is too high.

    up       load / (0.7 · capacity), if that is more than the fleet
    down     to the same, only while the load is below 0.6 of the fleet's capacity
    latency  above its threshold for 30 s: 1.5 × the ready replicas, one step per cold start

It forecasts nothing and sees no backlog. A step has no bound but `max_replicas`: while a few requests queue,
whatever the reason, each cold start brings half a fleet more. It is here to be compared with (`farthing
replay`), and for those who want it (`policy.rule`).
"""

from __future__ import annotations

from farthing_fleet.config import PolicyConfig
from farthing_fleet.types import Level, Need, PolicyState, Snapshot, whole

UP, DOWN = 0.7, 0.6  # utilizations
LASTING_S, FACTOR = 30.0, 1.5


class Published:
    """Evaluates the rule; its memory is the policy's state."""

    def __init__(self, config: PolicyConfig, state: PolicyState) -> None:
        self._config, self._state = config, state

    def levels(self, now: float, snapshot: Snapshot, load: float, rate: float) -> dict[Level, Need]:
        """The replicas required for the load and for the latency; `rate` is one replica's capacity."""
        unit, used = f"{self._config.unit}/s", load / (rate * max(1, snapshot.current))
        need, fits = load / (UP * rate), DOWN <= used <= UP
        text = f"load is {load:.4g} {unit}, {used:.0%} of the fleet's capacity"
        answers: dict[Level, Need] = {
            "short": Need(float(snapshot.current), f"{text}, stays")
            if fits
            else Need(need, f"{text}, needs {whole(need)}")
        }
        step = self._step(now, snapshot)
        if step is not None:
            answers["realtime"] = step
        return answers

    def _step(self, now: float, snapshot: Snapshot) -> Need | None:
        state, config = self._state, self._config
        latency = config.latency(snapshot)
        if latency is None or latency <= config.latency_threshold_s:
            state.breach_since = None
        elif state.breach_since is None:
            state.breach_since = now
        if state.step_time is not None:
            state.step_time = min(state.step_time, now)  # the clock may have gone back
        stepped = state.step_time is not None and now - state.step_time < config.lead_s(snapshot.cold_start_s)
        if not stepped and state.breach_since is not None and now - state.breach_since >= LASTING_S:
            # starting replicas already respond to the breach; multiplying them would count them twice
            number = snapshot.current if snapshot.ready is None else snapshot.ready
            state.step_time, state.step_target = now, whole(FACTOR * max(1, number))
            stepped = True
        if not stepped:
            return None
        text = f"{config.latency_metric} above {config.latency_threshold_s:g} s for {LASTING_S:g} s"
        return Need(state.step_target, f"{text}: {FACTOR:g} × the replicas, {state.step_target}")
