"""What one replica sustains: load units a second within the latency targets, given or learnt online.

Learning: while a replica meets its latency targets it carries at least what it carries now, so the estimate
rises to the largest load per ready replica seen without a breach; while the fleet has a backlog it is
saturated, so what it completes per replica is the capacity, and the estimate moves there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from farthing.fleet.decisions import Snapshot


@dataclass(frozen=True)
class Capacity:
    """A measured capacity, as `farthing bench capacity --json` writes it (`capacity` and `unit`)."""

    per_replica: float  # load units a second
    unit: str = "requests"  # or "tokens"
    source: str = "configured"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_replica) and self.per_replica > 0):
            raise ValueError(f"Capacity.per_replica = {self.per_replica}: a number above 0 is needed")
        if self.unit not in ("requests", "tokens"):
            raise ValueError(f"Capacity.unit = {self.unit!r}: 'requests' or 'tokens'")

    @classmethod
    def read(cls, path: str | Path) -> Capacity:
        """From a JSON file with `capacity` and `unit`. Raises ValueError naming what is missing."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("capacity"), int | float):
            raise ValueError(f"{path}: no number `capacity`; write it with `farthing bench capacity --json`")
        return cls(float(data["capacity"]), str(data.get("unit", "requests")), str(path))


@dataclass
class OnlineCapacity:
    """Learns the capacity from snapshots; starts from a guess and never leaves [guess/4, 4·guess]."""

    guess: float
    unit: str = "requests"
    latency_threshold_s: float = 0.2
    rate: float = 0.05  # share of the way to a new observation
    estimate: float = 0.0

    def __post_init__(self) -> None:
        if not self.guess > 0:
            raise ValueError(f"OnlineCapacity.guess = {self.guess}: a number above 0 is needed")
        self.estimate = self.estimate or self.guess

    def observe(self, snapshot: Snapshot, completed: float | None = None) -> float:
        """Take one snapshot into account; `completed` is the load finished a second, where it is known.

        Returns the estimate. Snapshots that are stale, or made while replicas start or fail, teach nothing.
        """
        load, ready = snapshot.load(self.unit), snapshot.ready
        if snapshot.stale or load is None or not ready or snapshot.starting or snapshot.queue_time_s is None:
            return self.estimate
        if snapshot.queue_time_s <= self.latency_threshold_s and not snapshot.backlog:
            observed = max(self.estimate, load / ready)
        elif snapshot.backlog and completed is not None and completed > 0:
            observed = completed / ready
        else:
            return self.estimate
        moved = self.estimate + self.rate * (observed - self.estimate)
        self.estimate = min(max(moved, self.guess / 4), self.guess * 4)
        return self.estimate
