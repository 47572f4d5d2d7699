"""What the controller knows beyond the present: forecasts of the load and the capacity of a replica,
kept up while it runs.
"""

from __future__ import annotations

from farthing.fleet.capacity import OnlineCapacity
from farthing.fleet.config import FleetConfig
from farthing.fleet.decisions import Forecast, Snapshot


class LiveOutlook:
    """Feeds the capacity model with every snapshot."""

    def __init__(self, config: FleetConfig) -> None:
        policy = config.policy
        self._capacity = OnlineCapacity(policy.capacity, policy.unit, policy.latency_threshold_s)
        self._last: Snapshot | None = None

    def observe(self, now: float, snapshot: Snapshot) -> None:
        self._capacity.observe(snapshot, self._completed(snapshot))
        self._last = snapshot

    def _completed(self, snapshot: Snapshot) -> float | None:
        """What was finished a second: what arrived, less what the queue grew by."""
        last, load = self._last, snapshot.load(self._capacity.unit)
        if last is None or load is None or last.backlog is None or snapshot.backlog is None:
            return None
        passed = snapshot.time - last.time
        if passed <= 0 or self._capacity.unit != "requests":
            return None
        return max(0.0, load - (snapshot.backlog - last.backlog) / passed)

    def short(self, now: float) -> Forecast | None:
        return None

    def mid(self, now: float) -> Forecast | None:
        return None

    def capacity(self) -> float | None:
        return self._capacity.estimate

    def maintain(self, now: float) -> None:
        """Nothing is fitted."""


def make_outlook(config: FleetConfig) -> LiveOutlook:
    """The outlook of a configuration."""
    return LiveOutlook(config)
