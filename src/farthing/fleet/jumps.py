"""Jumps of the load that no utilization could have served in time.

A replica that is launched now serves one cold start later. While the load exceeds what the fleet planned one
cold start ago carries at the lowest utilization, requests are late whatever the utilization, and so they are
until the response to the jump is ready and has drained the queue. Rule `slo` does not count them: they would
lower the utilization, at a cost, for hours in which it changes nothing.
"""

from __future__ import annotations

from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.policy_state import PolicyState


class Jumps:
    """Remembers what was planned for; the controller's state keeps it."""

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
        known = (
            [n for t, n in state.planned if since - config.window_s(lead_s) <= t <= since] if times else []
        )
        least = config.min_replicas * config.capacity
        if known and load > max(least, max(known) / config.slo.lowest):
            state.excused_until = now + lead_s + config.interval_s + config.drain_s
        return state.excused_until is not None and now <= state.excused_until
