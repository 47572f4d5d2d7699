"""Waking a fleet that is scaled to zero: gateways report the requests they hold, the policy starts replicas.

At zero replicas there is nothing to measure, so the usual signals are missing; what gateways hold is the
load. Each gateway reports to `/wake` on the controller's metrics port while it holds requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from farthing.fleet.decisions import Decision, Levels
from farthing.fleet.policy_config import PolicyConfig
from farthing.fleet.snapshot import Snapshot

_FRESH_S = 5.0  # a report that is older says nothing: gateways report each second


@dataclass
class Held:
    """Requests held by the gateways, as last reported by each; `reported` is set by every report."""

    clock: Callable[[], float] = time.monotonic
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    _reports: dict[str, tuple[int, float]] = field(default_factory=dict)  # gateway -> (requests, time)

    def report(self, gateway: str, waiting: int) -> None:
        """Take in one report. Raises ValueError on a number below zero."""
        if waiting < 0:
            raise ValueError(f"waiting = {waiting}: expected 0 or more")
        self._reports[gateway] = (waiting, self.clock())
        self.reported.set()

    def total(self) -> int:
        """Requests held at present; reports of gateways that fell silent do not count."""
        now = self.clock()
        self._reports = {name: r for name, r in self._reports.items() if now - r[1] <= _FRESH_S}
        return sum(waiting for waiting, _ in self._reports.values())


def wake(now: float, current: int, snapshot: Snapshot | None, config: PolicyConfig) -> Decision | None:
    """The decision that wakes a fleet of no replicas for the requests that wait; None where none do.

    As many replicas as work the backlog off within `drain_s` or a cold start, one at least.
    """
    backlog = snapshot.backlog if snapshot is not None else None
    if current != 0 or not backlog or config.max_replicas < 1:
        return None
    cold_start = snapshot.cold_start_s if snapshot is not None else None
    drain = max(config.drain_s, cold_start if cold_start is not None else config.cold_start_s)
    rate = config.capacity if config.unit == "requests" else math.inf  # requests are all that is known
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
        reason=f"wake: no replica and {backlog:.4g} requests wait, worked off in {drain:.0f} s by {need}",
    )
