"""Wake a fleet that is scaled to zero: gateways report held requests, and the policy starts replicas.

At zero replicas the usual signals are missing, so the requests held by gateways are the load. Each gateway
reports to `/wake` on the controller's metrics port while it holds requests.
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
